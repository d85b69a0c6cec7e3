"""Each path that the policy keeps in fp32, read off a real bf16 forward, backward and optimiser step."""

from dataclasses import dataclass, field

import pytest
import torch
from cases import model_spec, params, random_tokens
from torch import Tensor, nn

from sextant.axes.capacity import Dense, Experts
from sextant.axes.capacity.stack import ExpertStack
from sextant.axes.kv import GQA
from sextant.axes.numerics import BF16, FP32, FP32_PATHS, FP8Blocks, FP8Delayed
from sextant.axes.routing import Routing
from sextant.axes.stability import Linear, NormalInit, RMSNorm, SandwichNorm
from sextant.axes.stability.norm import RMSNormModule
from sextant.core.stream import Stream
from sextant.kernels import attention as attention_kernels
from sextant.kernels.loss import summed_loss
from sextant.model.block import Block
from sextant.model.spec import Layer, ModelSpec

SPEC: ModelSpec = model_spec(
    Layer(kv=GQA(heads=4, kv_heads=2, head_dim=8, qk_norm=RMSNorm()), feed_forward=Dense(hidden=24)),
    Layer(
        kv=GQA(heads=4, kv_heads=2, head_dim=8),
        feed_forward=Experts(experts=4, hidden=16, shared=8),
        residual=SandwichNorm(),
    ),
    width=32,
    init=NormalInit(std=0.1),
)


@dataclass
class Seen:
    """Dtypes met in one training step, by path; and what matrix products ran in."""

    paths: dict[str, set[torch.dtype]] = field(default_factory=dict)
    products: set[torch.dtype] = field(default_factory=set)
    loss: float = 0.0

    def add(self, path: str, *tensors: Tensor) -> None:
        self.paths.setdefault(path, set()).update(tensor.dtype for tensor in tensors)


def step(numerics, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """One forward, backward and AdamW step with eyes on every path."""
    seen, model = Seen(), SPEC.build(numerics, seed=1)
    combine = watch_combine(seen, monkeypatch)
    watch(model, seen)
    tokens_T = random_tokens(40)
    out = model(tokens_T, Stream.of_lengths([40]))
    loss = summed_loss(out.hidden_TD, model.head_PD, tokens_T.roll(-1)) / 40
    loss.backward()
    optimiser = torch.optim.AdamW(model.parameters())
    optimiser.step()
    seen.add("output logits", model.logits(out.hidden_TD))
    seen.add("loss", loss)
    seen.add("parameters", *model.parameters())
    seen.add("gradients", *(p.grad for p in model.parameters() if p.grad is not None))
    seen.add("optimiser state", *(s[key] for s in optimiser.state.values() for key in ("exp_avg", "exp_avg_sq")))
    seen.loss = loss.item()
    assert combine
    return seen


def watch(model: nn.Module, seen: Seen) -> None:
    def on(kind: type[nn.Module], look) -> None:
        for module in model.modules():
            if isinstance(module, kind):
                module.register_forward_hook(lambda m, args, out: look(args, out))

    model.get_submodule("embedding").register_forward_hook(lambda m, args, out: seen.add("embedding", out))
    on(Block, lambda args, out: seen.add("residual stream", args[0], out[0]))
    on(RMSNormModule, lambda args, out: seen.add("norms", out))
    on(Linear, lambda args, out: seen.products.update({args[0].dtype, out.dtype}))
    on(ExpertStack, lambda args, out: seen.products.update({args[0].dtype, out.dtype}))
    router = model.get_submodule("blocks.1.feed_forward.router")
    router.register_forward_hook(lambda m, args, out: look_at_routing(seen, args[0], out))


def look_at_routing(seen: Seen, x_TD: Tensor, routing: Routing) -> None:
    seen.add("router", x_TD, routing.logits_TE, routing.probs_TE, routing.gates_TA)


def watch_combine(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    from sextant.axes.routing.overflow import shares

    calls, combine = [], shares.combine

    def watched(y_ND, gates_TA, where):
        out = combine(y_ND, gates_TA, where)
        calls.append(y_ND.dtype)
        seen.add("expert combine", gates_TA, out)
        return out

    monkeypatch.setattr(shares, "combine", watched)
    return calls


def score_dtypes() -> set[torch.dtype]:
    """Whether attention over bf16 rows is as exact as fp32 scores make it: below what rounded scores would give."""
    q, k = (torch.randn(64, 2, 16).bfloat16() for _ in range(2))
    v_TGV, how = torch.randn(64, 2, 16).bfloat16(), attention_kernels.Scores(2.0)
    want = attention_kernels.attend_ragged(q.double(), k.double(), v_TGV.double(), [64], attention_kernels.Span(), how)
    keys = attention_kernels.Keys(k, v_TGV)
    got = attention_kernels.attend(q, keys, Stream.of_lengths([64]), attention_kernels.Span(), how)
    rounding = (want.bfloat16().double() - want).square().mean().sqrt()
    exact = (got.double() - want).square().mean().sqrt() < 1.3 * rounding
    return {torch.float32 if exact else torch.bfloat16}


LOWERED = params([BF16(), FP8Delayed(), FP8Blocks()])


@pytest.mark.parametrize("policy", LOWERED)
def test_every_fp32_path_is_fp32_in_a_lowered_step(policy, monkeypatch):
    """The declared list and the watched list are the same list, so a new path needs a new look."""
    seen = step(policy, monkeypatch)
    seen.paths["attention scores"] = score_dtypes()
    assert set(seen.paths) == set(FP32_PATHS)
    assert {path: dtypes for path, dtypes in seen.paths.items() if dtypes != {torch.float32}} == {}


@pytest.mark.parametrize("policy", LOWERED)
def test_products_run_in_the_compute_dtype(policy, monkeypatch):
    assert step(policy, monkeypatch).products == {torch.bfloat16}
    assert step(FP32(), monkeypatch).products == {torch.float32}


@pytest.mark.parametrize("policy", LOWERED)
def test_lowered_loss_is_close_to_fp32(policy, monkeypatch):
    lowered, full = step(policy, monkeypatch).loss, step(FP32(), monkeypatch).loss
    assert lowered == pytest.approx(full, rel=5e-3 if policy == BF16() else 1.5e-2)
    assert lowered != full


def operands(policy, monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str, str]]:
    """Formats of both operands of every FP8 product of a step, and which kind of product it was."""
    from sextant.axes.numerics import blocks, delayed

    met = set()

    def watched(where, product: str) -> None:
        plain = getattr(where, product)

        def look(left, right, *rest):
            met.add((product, str(left.values.dtype)[6:], str(right.values.dtype)[6:]))
            return plain(left, right, *rest)

        monkeypatch.setattr(where, product, look)

    watched(delayed, "rows_product")
    watched(blocks, "rows_product")
    watched(blocks, "columns_product")
    step(policy, monkeypatch)
    return met


def test_formats_of_fp8_products(monkeypatch):
    """MAI: E4M3 forward, E5M2 by E4M3 for the data gradient, no weight gradient. DeepSeek-V3: E4M3 for all three."""
    e4m3, e5m2 = "float8_e4m3fn", "float8_e5m2"
    assert operands(FP8Delayed(), monkeypatch) == {("rows_product", e4m3, e4m3), ("rows_product", e5m2, e4m3)}
    both = {("rows_product", e4m3, e4m3), ("columns_product", e4m3, e4m3)}
    assert operands(FP8Blocks(), monkeypatch) == both
    assert operands(FP8Delayed(data_gradient="bf16"), monkeypatch) == {("rows_product", e4m3, e4m3)}
    assert operands(BF16(), monkeypatch) == set()


def test_final_rows_are_in_the_compute_dtype():
    """The head's product runs in bf16; its logits are fp32 again."""
    out = SPEC.build(BF16())(random_tokens(5), Stream.of_lengths([5]))
    assert out.hidden_TD.dtype == torch.bfloat16


def test_itemsize_and_memory_follow_the_policy():
    for numerics, dtype in ((BF16(), torch.bfloat16), (FP8Delayed(), torch.bfloat16), (FP32(), torch.float32)):
        model = SPEC.build(numerics)
        assert model.memory(1).layers[0].k.dtype == dtype
        assert numerics.itemsize == dtype.itemsize


def test_bf16_decode_follows_bf16_prefill():
    """The contract under half precision, within its digits."""
    model, tokens_T = SPEC.build(BF16(), seed=1), random_tokens(12)
    with torch.no_grad():
        whole_TP = model.logits(model(tokens_T, Stream.of_lengths([12])).hidden_TD)
        memory = model.memory(1)
        steps = [model(token, Stream.of_lengths([1], memory=memory)).hidden_TD for token in tokens_T.split(1)]
    torch.testing.assert_close(model.logits(torch.cat(steps)), whole_TP, rtol=3e-2, atol=3e-2)
