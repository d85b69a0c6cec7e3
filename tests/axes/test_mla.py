"""Latent attention: two forms, the same numbers; what is kept; where each form pays. Ids of spec deepseek-v3 1.7."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import DENSE, built, chunked, close, model_spec, random_tokens, run
from torch import Tensor

from sextant.axes.attention import Full, MoBA
from sextant.axes.kv import GQA, MLA, RoPE, YaRNScaling
from sextant.axes.kv.mla import MLAModule
from sextant.axes.numerics import BF16, FP32
from sextant.core.cost import At
from sextant.core.errors import UsageError
from sextant.core.state import Keys, RowSpec, RowState
from sextant.core.stream import Stream
from sextant.kernels.attention import Span, attend
from sextant.kernels.attention.topk import block_means
from sextant.model.spec import Layer

V3 = MLA(heads=128, rank=512, nope_dim=128, rope_dim=64, v_dim=128, q_rank=1536)
PLAIN = MLA(heads=4, rank=12, nope_dim=6, rope_dim=4, v_dim=5, q_rank=7)
LITE = PLAIN.replace(q_rank=None)
DIRECT = pytest.mark.parametrize("spec", [PLAIN, LITE], ids=["latent-queries", "plain-queries"])


def module(spec: MLA, numerics=FP32(), dtype=torch.float64) -> MLAModule:  # noqa: B008
    """Random, gains included."""
    torch.manual_seed(2)
    built_ = spec.build(10, numerics).to(dtype)
    for parameter in built_.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return built_


def outputs(kv: MLAModule, x_TD: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Full attention of one step in both forms: multiplied out, and absorbed over an empty state."""
    stream = Stream.of_lengths(lengths)
    memory = memory_of(kv.spec, len(lengths), x_TD.dtype)
    results = []
    for heads in (kv.project(x_TD, stream), kv.project(x_TD, replace(stream, memory=memory), reads_state=True)):
        o_THV = attend(heads.q_THK, Keys(heads.k_TGK, heads.v_TGV), stream, Span(), kv.scores)
        results.append(kv.output(o_THV, heads))
    return results[0], results[1]


def memory_of(spec: MLA, batch: int, dtype=torch.float64):
    return model_spec(Layer(kv=spec, feed_forward=DENSE)).build(device="cpu").to(dtype).memory(batch)


@DIRECT
@pytest.mark.parametrize("lengths", [[1], [17], [5, 1, 12]])
def test_mla_1_absorbed_equals_multiplied_out(spec, lengths):
    x_TD = torch.randn(sum(lengths), 10, dtype=torch.float64, requires_grad=True)
    kv = module(spec)
    naive_TD, absorbed_TD = outputs(kv, x_TD, lengths)
    close(absorbed_TD, naive_TD, 1e-12)
    parameters = [x_TD, *kv.parameters()]
    weights_TD = torch.randn_like(naive_TD)
    wants = torch.autograd.grad((naive_TD * weights_TD).sum(), parameters)
    for got, want in zip(torch.autograd.grad((absorbed_TD * weights_TD).sum(), parameters), wants, strict=True):
        close(got, want, 1e-10)


@DIRECT
def test_mla_1_in_bf16(spec):
    x_TD = torch.randn(17, 10)
    naive_TD, absorbed_TD = outputs(module(spec, BF16(), torch.float32), x_TD, [17])
    want_TD, _ = outputs(module(spec, dtype=torch.float32), x_TD, [17])
    assert naive_TD.dtype == torch.bfloat16 and want_TD.dtype == torch.float32
    for got_TD in (naive_TD, absorbed_TD):
        assert (got_TD - want_TD).norm() < 2e-2 * want_TD.norm()


@DIRECT
def test_mla_by_the_equations(spec):
    """Spec 1.2, one head and one pair at a time."""
    kv, x_TD, stream = module(spec), torch.randn(6, 10, dtype=torch.float64), Stream.of_lengths([6])

    def normed(x: Tensor, gain: Tensor) -> Tensor:
        return gain * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turned(x: Tensor, t: int) -> Tensor:
        angle = t * 10_000.0 ** (-torch.arange(0, 4, 2, dtype=torch.float64) / 4)
        a, b = x[0::2], x[1::2]
        return torch.stack((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1).flatten()

    weight = dict(kv.named_parameters())
    if spec.q_rank:
        q = normed(x_TD @ weight["q.down.weight"].T, weight["q.norm.gain"]) @ weight["q.up.weight"].T
    else:
        q = x_TD @ weight["q.weight"].T
    q, down = q.unflatten(-1, (4, 10)), x_TD @ weight["kv_a.weight"].T
    latent = normed(down[:, :12], weight["kv_norm.gain"])
    up = (latent @ weight["kv_b.weight"].T).unflatten(-1, (4, 11))
    want = torch.zeros(6, 4, 5, dtype=torch.float64)
    for h in range(4):
        for t in range(6):
            query = torch.cat([q[t, h, :6], turned(q[t, h, 6:], t)])
            keys = [torch.cat([up[j, h, :6], turned(down[j, 12:], j)]) for j in range(t + 1)]
            p = torch.softmax(torch.stack([query @ key for key in keys]) / 10**0.5, 0)
            want[t, h] = p @ up[: t + 1, h, 6:]
    heads = kv.project(x_TD, stream)
    o_THV = attend(heads.q_THK, Keys(heads.k_TGK, heads.v_TGV), stream, Span(), kv.scores)
    close(o_THV, want.detach(), 1e-12)
    close(kv.output(o_THV, heads), want.flatten(1).detach() @ weight["o.weight"].T, 1e-12)


@DIRECT
def test_mla_2_and_8_however_it_is_fed(spec):
    """Prompt and steps, and every size of chunk, on both sides of the crossover."""
    model, tokens_T = built(Full(), spec), random_tokens(30)
    whole_TP = run(model, tokens_T, [30])
    for size in (1, 2, 9, 10, 11, 13, 29):
        close(chunked(model, tokens_T, [size] * (30 // size)), whole_TP)


def test_mla_3_the_state_keeps_the_normalised_latent_and_the_turned_key():
    spec = PLAIN.row()
    assert spec == RowSpec(1, 16, 0, shared=12) and V3.row().k_dim == 576
    assert V3.row().nbytes(1, 2) * 61 == 70_272  # bytes per token of V3 in bf16, spec 1.6
    model = built(Full(), PLAIN, layers=1)
    kv, memory, rows = model.blocks[0].attention.kv, model.memory(1), []
    hook = kv.kv_b.register_forward_pre_hook(lambda _, args: rows.append(args[0]))
    run(model, random_tokens(9), [9], memory)
    hook.remove()
    state = memory.layers[0]
    assert isinstance(state, RowState)
    k_SGK, v_SGV = state.sequence(0)
    assert torch.equal(k_SGK[:, 0, :12], rows[0]) and torch.equal(v_SGV, k_SGK[..., :12])
    assert memory.nbytes == 9 * 16 * 8


def test_mla_3_the_turned_key_is_not_normalised():
    kv, x_TD = module(LITE), torch.randn(5, 10, dtype=torch.float64)
    heads = kv.project(x_TD, Stream.of_lengths([5]))
    twice = kv.project(2 * x_TD, Stream.of_lengths([5]))
    row, row_of_twice = heads.rows[0], twice.rows[0]
    close(row_of_twice[..., 12:], 2 * row[..., 12:], 1e-12)
    close(row_of_twice[..., :12], row[..., :12], 1e-5)  # but for the eps


def test_mla_4_layouts_are_a_permutation_of_weights():
    """Interleaved rows put in halves score alike; left as they are, they do not."""
    half = LITE.replace(rope_dim=8, position=RoPE(layout="half"))
    inter = half.replace(position=RoPE(layout="interleaved"))
    a, b = module(inter), module(half)
    b.load_state_dict(a.state_dict())
    x_TD = torch.randn(40, 10, dtype=torch.float64)
    close(outputs(a, x_TD[:1], [1])[0], outputs(b, x_TD[:1], [1])[0])  # invisible at position 0
    assert (outputs(a, x_TD, [40])[0] - outputs(b, x_TD, [40])[0]).abs().max() > 1e-2
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    with torch.no_grad():
        q_HKD = b.q.weight.unflatten(0, (4, 14))  # type: ignore[union-attr]
        q_HKD[:, 6:] = q_HKD[:, 6 + order]
        b.kv_a.weight[12:] = b.kv_a.weight[12 + order]
    close(outputs(b, x_TD, [40])[0], outputs(a, x_TD, [40])[0], 1e-11)


@DIRECT
def test_mla_5_only_distances_count(spec):
    model, tokens_T, stream = built(Full(), spec), random_tokens(12), Stream.of_lengths([12])
    late = replace(stream, positions_T=stream.positions_T + 5000, turns={})
    with torch.no_grad():
        close(model.logits(model(tokens_T, late).hidden_TD), run(model, tokens_T, [12]), 1e-9)


def test_mla_6_the_scale_holds_yarns_temperature():
    """Spec 1.2 and 9: 0.0721688 before extension, 0.1352338 after, 0.1147214 for V2's mscale."""
    def scaled(mscale: float) -> MLA:
        return V3.replace(position=RoPE(scaling=YaRNScaling(
            factor=40.0, original=4096, mscale=mscale, mscale_all_dim=mscale
        )))

    assert V3.scale == pytest.approx(0.0721688, rel=1e-6)
    assert scaled(1.0).scale == pytest.approx(0.1352338, rel=1e-6)
    assert scaled(0.707).scale == pytest.approx(0.1147214, rel=1e-6)
    assert scaled(1.0).position.scaling.temperature == 1.0  # type: ignore[union-attr]


def test_mla_6_a_wrong_scale_shows_after_the_first_token():
    yarn = YaRNScaling(factor=40.0, original=4096, mscale=1.0, mscale_all_dim=1.0)
    right, wrong = LITE.replace(position=RoPE(scaling=yarn)), LITE.replace(
        position=RoPE(scaling=yarn.replace(mscale_all_dim=None, attention_factor=1.0))
    )
    a, b = module(right), module(wrong)
    b.load_state_dict(a.state_dict())
    x_TD = torch.randn(20, 10, dtype=torch.float64)
    gap_T = (outputs(a, x_TD, [20])[0] - outputs(b, x_TD, [20])[0]).abs().amax(-1)
    assert gap_T[0] < 1e-12 and gap_T[1:].min() > 1e-4


def test_mla_7_without_its_turning_part_the_past_has_no_order():
    kv = module(LITE)
    with torch.no_grad():
        kv.q.weight.unflatten(0, (4, 10))[:, 6:] = 0  # type: ignore[union-attr]
        kv.kv_a.weight[12:] = 0
    x_TD = torch.randn(9, 10, dtype=torch.float64)
    order = torch.tensor([3, 0, 6, 1, 7, 2, 5, 4, 8])
    close(outputs(kv, x_TD[order], [9])[0][-1], outputs(kv, x_TD, [9])[0][-1], 1e-12)
    assert (outputs(module(LITE), x_TD[order], [9])[0][-1] - outputs(module(LITE), x_TD, [9])[0][-1]).abs().max() > 1e-3


@pytest.mark.parametrize("spec", [PLAIN, LITE, PLAIN.replace(bias=True), LITE.replace(bias=True)])
def test_mla_10_parameters(spec):
    """MLA-9, parity with transformers, is in tests/convert."""
    assert spec.cost(10, At(8)).params == sum(p.numel() for p in module(spec).parameters())
    assert V3.cost(7168, At(1)).params == 187_107_328


def test_each_form_where_it_pays():
    """Spec 1.6: over a long prefix, chunks of 171 queries or more multiply it out."""
    assert not V3.multiplies([170], [10**7]) and V3.multiplies([171], [10**7])
    assert V3.multiplied_flops(1, 0) == 81_920 and V3.absorbed_flops(1, 0) == 278_528
    assert V3.absorbed_flops(0, 1) == pytest.approx(33.6e6, rel=2e-3)
    assert not V3.multiplies([500, 1, 1, 1], [10, *[10**7] * 3])  # one long prompt does not pay for three prefixes


def test_a_long_chunk_over_a_prefix_multiplies_out(monkeypatch):
    """The rule is in use, for full attention; a pattern that reads its state takes latents."""
    forms, project = [], MLAModule.project

    def watched(self, x_TD, stream, reads_state=False):
        heads = project(self, x_TD, stream, reads_state)
        forms.append("latent" if heads.latent else "by head")
        return heads

    monkeypatch.setattr(MLAModule, "project", watched)
    model, tokens_T = built(Full(), PLAIN, layers=1), random_tokens(40)
    chunked(model, tokens_T, [10, 1, 25, 4])
    assert forms == ["by head", "latent", "by head", "latent"]
    forms.clear()
    chunked(built(MoBA(block=3, top_k=2), PLAIN, layers=1), tokens_T, [10, 1, 25, 4])
    assert forms == ["latent"] * 4


def test_moba_over_latents_is_moba_over_keys():
    """Block means of kept rows, scored by absorbed queries, are those of full keys (spec sparse-attention 20)."""
    kv, x_TD, stream = module(PLAIN), torch.randn(24, 10, dtype=torch.float64), Stream.of_lengths([24])
    naive = kv.project(x_TD, stream)
    absorbed = kv.project(x_TD, replace(stream, memory=memory_of(PLAIN, 1)), reads_state=True)

    def gates(heads) -> Tensor:
        means_MGK = block_means(heads.k_TGK, 4, 0, 6)
        each = means_MGK.expand(-1, 4, -1) if means_MGK.shape[1] == 1 else means_MGK
        return torch.einsum("thk,mhk->thm", heads.q_THK, each)

    want = gates(naive)
    assert (gates(absorbed) - want).abs().max() < 7e-15 * max(1.0, want.abs().max())
    assert absorbed.k_TGK.shape == (24, 1, 16)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_dim": 3}, "rotary width 3 must be even"),
        ({"rank": 0}, "rank"),
        ({"position": {"kind": "nope"}}, "kind"),
        ({"q_rank": 0}, "q_rank"),
    ],
)
def test_impossible_latents_are_refused(fields, words):
    with pytest.raises(UsageError, match=words):
        MLA.parse({**PLAIN.to_dict(), **fields})


def test_an_unknown_kind_of_kv_is_refused():
    with pytest.raises(UsageError, match="mla"):
        Layer.parse({"kv": {**PLAIN.to_dict(), "kind": "mlla"}, "feed_forward": DENSE})
    layer = {"kv": GQA(heads=2, kv_heads=1, head_dim=4).to_dict(), "feed_forward": DENSE.to_dict()}
    assert isinstance(Layer.parse(layer).kv, GQA)
