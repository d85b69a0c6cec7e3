"""The contracts on a CUDA device: fp32 against the CPU, bf16 against fp64 references, the kernels only a GPU has."""

import copy

import pytest
import torch
from cases import allowed, examples, model_spec, params, random_tokens
from torch import Tensor

from sextant.axes.attention import DSA, Full, Mixer, Window
from sextant.axes.attention import TABLE as ATTENTION
from sextant.axes.attention.seer import Density
from sextant.axes.capacity import Dense, Experts, LatentExperts
from sextant.axes.kv import GQA, ALiBi, NoPE, RoPE
from sextant.axes.numerics import BF16, FP32
from sextant.axes.routing import SoftmaxTopK
from sextant.axes.stability import Linear, NormalInit, RMSNorm, SandwichNorm
from sextant.core.state import Keys
from sextant.core.stream import Stream
from sextant.kernels.attention import Scores, Span, attend, attend_ragged
from sextant.kernels.grouped import grouped_linear, grouped_linear_reference
from sextant.kernels.loss import summed_loss, token_losses
from sextant.kernels.norm import rms_norm, rms_norm_reference
from sextant.kernels.permute import combine, dispatch, plan
from sextant.model.spec import Layer
from sextant.train import checkpoint

pytestmark = pytest.mark.gpu
GPU = "cuda"
KVS = (
    GQA(heads=4, kv_heads=2, head_dim=16),
    GQA(heads=6, kv_heads=1, head_dim=16, position=NoPE(), qk_norm=RMSNorm()),
    GQA(heads=4, kv_heads=4, head_dim=16, position=RoPE(fraction=0.5, layout="interleaved")),
    GQA(heads=6, kv_heads=2, head_dim=16, position=ALiBi()),
    GQA(heads=6, kv_heads=2, head_dim=24, v_head_dim=16),
)
DENSE = Dense(hidden=64)
MIXTURES = (
    Experts(experts=6, hidden=32, router=SoftmaxTopK(top_k=2), shared=16),
    LatentExperts(experts=6, hidden=32, latent=16, router=SoftmaxTopK(top_k=3)),
)


def combinations():
    for attention in examples(ATTENTION):
        for kv in (None,) if isinstance(attention, Mixer) else KVS:
            if allowed(attention, kv):
                yield attention, kv


ALL = params(combinations())


def build(attention=Full(), kv=KVS[0], feed_forward=DENSE, numerics=FP32(), device=GPU):  # noqa: B008 - frozen
    layer = Layer(attention=attention, kv=kv, feed_forward=feed_forward, residual=SandwichNorm())
    spec = model_spec(layer, layer, width=32, init=NormalInit(std=0.1))
    return spec.build(numerics, seed=3, device=device).eval()  # some patterns are full attention while they train


@torch.no_grad()
def run(model, tokens_T: Tensor, lengths: list[int], memory=None) -> Tensor:
    device = model.embedding.weight.device
    stream = Stream.of_lengths(lengths, device, memory)
    return model.logits(model(tokens_T.to(device), stream).hidden_TD)


def decoded(model, tokens_T: Tensor, sizes: list[int]) -> Tensor:
    memory = model.memory(1)
    return torch.cat([run(model, piece, [len(piece)], memory) for piece in tokens_T.split(sizes)])


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Within a tolerance of the largest wanted value, or of 0.01 where all are smaller."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    error = (got - want).abs().max().item() / max(want.abs().max().item(), 1e-2)
    finite = bool(got.isfinite().all())
    assert finite and error <= tolerance, f"off by {error:.2e} of the largest value"


@pytest.mark.parametrize("feed_forward", params([DENSE, *MIXTURES]))
@pytest.mark.parametrize(("attention", "kv"), ALL)
def test_fp32_equals_the_cpu(attention, kv, feed_forward):
    """Packed, chunked and step by step: one answer on both devices. TF32 stays off."""
    assert not torch.backends.cuda.matmul.allow_tf32
    if isinstance(attention, DSA):  # a ReLU leaves scores of nothing, and devices part near-ties at 0 by a rounding
        attention = without_choice(attention)
    model, on_cpu = (build(attention, kv, feed_forward, device=device) for device in (GPU, "cpu"))
    tokens_T, lengths = random_tokens(23), [7, 1, 0, 15]
    want_TP = run(on_cpu, tokens_T, lengths)
    close(run(model, tokens_T, lengths), want_TP, 1e-4)
    close(decoded(model, tokens_T[8:], [6] + [1] * 9), want_TP[8:], 1e-4)
    close(decoded(model, tokens_T[8:], [3, 5, 7]), want_TP[8:], 1e-4)


def near(got: Tensor, want: Tensor, tolerance: float = 2e-2) -> None:
    """Within a tolerance of the wanted values in the root mean square: bf16 rounds each of two layers' rows to 2^-9."""
    error = ((got - want).square().mean() / want.square().mean()).sqrt().item()
    assert error <= tolerance, f"off by {error:.2e} in the root mean square"


def without_choice(attention):
    """Rounded queries and keys decide near-ties otherwise; where every block is chosen nothing hangs on that."""
    everything = {"top_k": 64, "rule": Density(share=1.0)}
    return attention.replace(**{name: x for name, x in everything.items() if name in type(attention).model_fields})


def off_by_a_rounding(model, seed: int):
    """The model in exact arithmetic, with every matrix and what goes in and out off by up to two bf16 roundings."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)

    def off(x: Tensor) -> Tensor:
        return x * (1 + (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1) * 2**-8)

    for module in model.modules():
        if isinstance(module, Linear):
            module.weight.data = off(module.weight.data)
            module.register_forward_pre_hook(lambda m, args: (off(args[0]),))
            module.register_forward_hook(lambda m, args, out: off(out))
    return model


def calm_rows(attention, kv, tokens_T: Tensor, lengths: list[int]) -> Tensor:
    """bool ``[T]``: the two thirds of the rows that roundings move least: they say whether more than rounding is wrong.

    A mixer divides each head's output by its own size. Where it nearly cancels (a query across its only key will do),
    any rounding turns it; in fp64 with random errors of such size it is the same rows that move, by up to 0.6.
    """
    exact = build(attention, kv, device="cpu").double()
    want_TP = run(exact, tokens_T, lengths)
    moved = [run(off_by_a_rounding(exact, seed), tokens_T, lengths) - want_TP for seed in range(8)]
    largest_T = torch.stack([x.square().mean(-1) for x in moved]).amax(0)
    moved_T = largest_T / want_TP.square().mean(-1)
    return moved_T <= moved_T.quantile(2 / 3)


@pytest.mark.parametrize(("attention", "kv"), ALL)
def test_bf16_packed_chunked_and_decoded_agree(attention, kv):
    attention, mixes = without_choice(attention), isinstance(attention, Mixer)
    model, exact = build(attention, kv, numerics=BF16()), build(attention, kv)
    tokens_T, lengths = random_tokens(48), [17, 1, 30]
    calm_T = calm_rows(attention, kv, tokens_T, lengths) if mixes else torch.ones(48, dtype=torch.bool)
    want_TP, tolerance = run(exact, tokens_T, lengths).cpu(), 3e-2 if mixes else 2e-2

    def agrees(got_TP: Tensor, start: int = 0) -> None:
        near(got_TP.cpu()[calm_T[start:]], want_TP[start:][calm_T[start:]], tolerance)

    agrees(run(model, tokens_T, lengths))
    agrees(torch.cat([run(model, x, [len(x)]) for x in tokens_T.split(lengths)]))
    agrees(decoded(model, tokens_T[18:], [16] + [1] * 14), 18)
    agrees(decoded(model, tokens_T[18:], [9, 9, 12]), 18)


@pytest.mark.parametrize(("attention", "kv"), ALL)
def test_bf16_documents_do_not_leak(attention, kv):
    model, tokens_T = build(attention, kv, numerics=BF16()), random_tokens(40)
    before_TP = run(model, tokens_T, [17, 23])
    tokens_T[:17] = random_tokens(17, seed=1)
    after_TP = run(model, tokens_T, [17, 23])
    assert torch.equal(after_TP[17:], before_TP[17:]) and not torch.equal(after_TP[:17], before_TP[:17])


def test_ragged_batch_in_one_memory():
    model, on_cpu = build(Window(window=4)), build(Window(window=4), device="cpu")
    memory, twin, tokens_T = model.memory(3), on_cpu.memory(3), random_tokens(40)
    for lengths in ([5, 1, 7], [1, 1, 1], [1, 0, 1], [2, 4, 3], [1, 1, 1]):
        piece = tokens_T[: sum(lengths)]
        close(run(model, piece, lengths, memory), run(on_cpu, piece, lengths, twin), 1e-4)


SPANS = params([Span(), Span(5), Span(64), Span(200), Span(1), Span(6, sinks=3)])


@pytest.mark.parametrize("lengths", [[129], [64, 64], [3, 0, 130, 1, 66]], ids=str)
@pytest.mark.parametrize("with_slopes", [False, True], ids=["dot", "alibi"])
@pytest.mark.parametrize("span", SPANS)
def test_bf16_attention_equals_the_fp64_reference(span, with_slopes, lengths):
    """The batched and the variable-length kernel, windows included, outputs and gradients."""
    total = sum(lengths)
    shapes = (total, 6, 32), (total, 2, 32), (total, 2, 32)
    rows = [torch.randn(shape, device=GPU).bfloat16().requires_grad_() for shape in shapes]
    exact = [row.detach().double().requires_grad_() for row in rows]
    slopes_H = torch.rand(6, device=GPU) if with_slopes else None
    how, weight = Scores(0.25, slopes_H), torch.randn(total, 6, 32, device=GPU)
    got = attend(rows[0], Keys(rows[1], rows[2]), Stream.of_lengths(lengths, GPU), span, how)
    want = attend_ragged(*exact, lengths, span, how)
    close(got, want, 1e-2)
    got_grads = torch.autograd.grad((got * weight.bfloat16()).sum(), rows)
    for g, w in zip(got_grads, torch.autograd.grad((want * weight.bfloat16().double()).sum(), exact), strict=True):
        close(g, w, 2e-2)


@pytest.mark.parametrize("counts", [[8, 8, 8], [1, 0, 31, 16], [0, 0, 40], [0, 5, 0]], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_grouped_linear(counts, dtype, tolerance):
    """The grouped kernel in bf16, the loop in fp32; empty experts get a zero gradient."""
    x = torch.randn(sum(counts), 32, device=GPU).to(dtype).requires_grad_()
    w = torch.randn(len(counts), 32, 48, device=GPU).requires_grad_()
    exact = [t.detach().to(dtype).double().requires_grad_() for t in (x, w)]
    counts_E, weight = torch.tensor(counts, device=GPU), torch.randn(sum(counts), 48, device=GPU).to(dtype)
    got, want = grouped_linear(x, w, counts_E), grouped_linear_reference(*exact, counts_E)
    assert got.dtype == dtype
    close(got, want, tolerance)
    got_grads = torch.autograd.grad((got * weight).sum(), (x, w))
    for g, r in zip(got_grads, torch.autograd.grad((want * weight.double()).sum(), exact), strict=True):
        close(g, r, tolerance)
    assert all((got_grads[1][e] == 0).all() for e, count in enumerate(counts) if not count)


def test_experts_round_trip():
    experts_TA = torch.rand(50, 9, device=GPU).argsort(-1)[:, :4]
    x_TD, where = torch.randn(50, 16, device=GPU), plan(experts_TA, 9)
    gates_TA = torch.full((50, 4), 0.25, device=GPU)
    close(combine(dispatch(x_TD, where, 4), gates_TA, where), x_TD, 1e-6)


@pytest.mark.parametrize("experts", [8, 300, 2000])
def test_ties_go_to_the_lower_number(experts):
    """A GPU's sort is stable only when asked."""
    router = SoftmaxTopK(top_k=8).build(16, experts).to(GPU)
    torch.nn.init.zeros_(router.weight)
    assert router(torch.randn(70, 16, device=GPU)).experts_TA.tolist() == [list(range(8))] * 70


def test_norm():
    x, gain_D = torch.randn(65, 96, device=GPU).bfloat16(), torch.randn(96, device=GPU)
    close(rms_norm(x, gain_D, 1e-6), rms_norm_reference(x.double(), gain_D.double(), 1e-6), 1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str)
def test_loss(dtype, tolerance, softcap):
    x = torch.randn(130, 64, device=GPU).to(dtype).requires_grad_()
    head = torch.randn(257, 64, device=GPU).requires_grad_()
    exact = [t.detach().to(dtype).double().requires_grad_() for t in (x, head)]
    targets_T = torch.randint(257, (130,), device=GPU)
    targets_T[::5] = -100
    got, want = summed_loss(x, head, targets_T, softcap, 48), token_losses(*exact, targets_T, softcap).sum()
    assert got.dtype == torch.float32
    close(got, want, tolerance)
    got_grads = torch.autograd.grad(got, (x, head))
    for g, r in zip(got_grads, torch.autograd.grad(want, exact), strict=True):
        close(g, r, tolerance)


def gradients(model, device: str) -> dict[str, Tensor]:
    tokens_T = random_tokens(60).to(device)
    out = model(tokens_T, Stream.of_lengths([20, 40], device))
    (summed_loss(out.hidden_TD, model.head_PD, tokens_T.roll(-1)) / 60).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("feed_forward", params([DENSE, *MIXTURES]))
def test_fp32_gradients_equal_the_cpu(feed_forward):
    model, on_cpu = (build(Window(window=8), feed_forward=feed_forward, device=device) for device in (GPU, "cpu"))
    got, want = gradients(model, GPU), gradients(on_cpu, "cpu")
    for name in want:
        close(got[name], want[name], 1e-3)


@pytest.mark.parametrize("feed_forward", params([DENSE, *MIXTURES]))
def test_bf16_learns(feed_forward):
    """Twenty steps on one batch: every gradient finite and fp32, the loss well below its start."""
    model, losses = build(Window(window=8), feed_forward=feed_forward, numerics=BF16()), []
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens_T, stream = random_tokens(60).to(GPU), Stream.of_lengths([20, 40], GPU)
    for _ in range(20):
        optimiser.zero_grad()
        loss = summed_loss(model(tokens_T, stream).hidden_TD, model.head_PD, tokens_T.roll(-1)) / 60
        loss.backward()
        grads = [parameter.grad for parameter in model.parameters()]
        assert all(grad is not None and grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_checkpoint_round_trip(tmp_path):
    """Written from the device and read to either side, bit for bit."""
    model = build(feed_forward=MIXTURES[0])
    path = checkpoint.save(tmp_path, 7, {"model": model.state_dict()}, {"step": 7}, {"recipe": "tiny"})
    for device in (GPU, "cpu"):
        found = checkpoint.load(path, device)
        assert found.step == 7
        for name, tensor in model.state_dict().items():
            read = found.parts["model"][name]
            assert read.device.type == device and torch.equal(read.to(GPU), tensor)


@pytest.mark.parametrize("name", ["llama-3-8b", "mistral-7b", "mai-base-1", "mixtral-8x7b"])
@pytest.mark.parametrize("lengths", [[128, 128], [100, 156]], ids=["rows", "packed"])
def test_compiled_blocks_give_the_same_gradients(name: str, lengths: list[int]) -> None:
    """Generated code against plain execution in bf16, whole gradient by root mean square."""
    from sextant.recipes import get
    from sextant.train.loss import Balance, micro_loss

    spec = get(name).twin().model
    spec = spec.replace(layers=spec.layers[-2:])
    plain, compiled = (spec.build(BF16(), device="cuda", seed=3) for _ in range(2))
    for block in compiled.blocks:
        block.compile()
    tokens_T = torch.randint(spec.vocab, (256,), device="cuda")
    for model in (plain, compiled):
        balance = Balance(spec)
        micro_loss(
            model, tokens_T, tokens_T.roll(-1), Stream.of_lengths(lengths, "cuda"), balance, 256, 256
        ).total.backward()
    for (parameter, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        error = (a.grad - b.grad).norm() / a.grad.norm().clamp_min(1e-6)
        assert error < 1e-1, f"{parameter}: {error}"
