"""Grouped heads: repeating KV heads is MHA, query-key norm bounds scores, declarations that cannot be are refused."""

import pytest
import torch
from cases import built, close, examples, model_spec, params, random_tokens, run

from sextant.axes.attention import Full, Window
from sextant.axes.capacity import Dense
from sextant.axes.kv import GQA, TABLE, NoPE, RoPE
from sextant.axes.numerics import FP32
from sextant.axes.stability import RMSNorm
from sextant.core.errors import UsageError
from sextant.core.stream import Stream
from sextant.model.spec import Layer


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("pattern", [Full(), Window(window=3)], ids=["full", "window"])
def test_repeated_kv_heads_make_multi_head_attention(groups, pattern):
    """Query head h reads KV head h // (H / G)."""
    grouped = built(pattern, GQA(heads=6, kv_heads=groups, head_dim=4, bias=True), layers=1)
    spec = model_spec(
        Layer(attention=pattern, kv=GQA(heads=6, kv_heads=6, head_dim=4, bias=True), feed_forward=Dense(hidden=9))
    )
    multi = spec.build().double()
    weights = dict(grouped.state_dict())
    for name in [name for name in weights if ".kv.k." in name or ".kv.v." in name]:
        weights[name] = weights[name].unflatten(0, (groups, 4)).repeat_interleave(6 // groups, 0).flatten(0, 1)
    multi.load_state_dict(weights)
    tokens_T = random_tokens(9)
    close(run(multi, tokens_T, [9]), run(grouped, tokens_T, [9]))


@pytest.mark.parametrize("bias", [True, False])
def test_joined_projections_give_the_same_and_keep_their_weights(bias):
    module = GQA(heads=4, kv_heads=2, head_dim=4, bias=bias).build(10, FP32()).double().requires_grad_(False)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x_TD, stream = torch.randn(5, 10, dtype=torch.float64), Stream.of_lengths([5])
    want, kept = module.project(x_TD, stream), {name: value.clone() for name, value in module.state_dict().items()}
    module.join()
    got = module.project(x_TD, stream)
    for g, w in zip((got.q_THK, *got.rows), (want.q_THK, *want.rows), strict=True):
        close(g, w, 1e-12)
    assert list(module.state_dict()) == list(kept)
    assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())
    module.v.weight.zero_()  # a view of the joint matrix: what is loaded into a layer reaches the product
    values_TGV = module.project(x_TD, stream).v_TGV
    close(values_TGV, (module.v.bias if bias else torch.zeros(8)).double().expand(5, -1).view_as(values_TGV), 1e-12)


@pytest.mark.parametrize("position", params([RoPE(), RoPE(fraction=0.5), NoPE()]))
@pytest.mark.parametrize("kv", params(kv for kv in examples(TABLE) if isinstance(kv, GQA)))
def test_projection_by_definition(kv, position):
    """Product and bias, clip, norm, position code, in this order; values take the first two alone."""
    kv = kv.replace(position=position if kv.head_dim % 4 == 0 else NoPE())
    module = kv.build(10, FP32()).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x_TD, stream = torch.randn(5, 10, dtype=torch.float64), Stream.of_lengths([5])

    def rows(linear, norm=None, dim=kv.head_dim):
        y_TN = x_TD @ linear.weight.T + (linear.bias if kv.bias else 0)
        y_TN = y_TN if kv.clip is None else y_TN.clip(-kv.clip, kv.clip)
        y_THK = y_TN.unflatten(-1, (-1, dim))
        if norm is None:
            return y_THK
        over = -1 if kv.qk_norm_over == "head" else (-2, -1)
        return norm.gain.view(-1, dim) * y_THK / (y_THK.square().mean(over, keepdim=True) + 1e-6).sqrt()

    want_q, want_k = module.position(rows(module.q, module.q_norm), rows(module.k, module.k_norm), stream)
    heads = module.project(x_TD, stream)
    q, k, v = heads.q_THK, heads.k_TGK, heads.v_TGV
    close(q, want_q, 1e-12)
    close(k, want_k, 1e-12)
    close(v, rows(module.v, dim=kv.shape[3]), 1e-12)
    o_THV = torch.randn(5, kv.heads, kv.shape[3], dtype=torch.float64)
    close(module.output(o_THV, heads), o_THV.flatten(1) @ module.o.weight.T, 1e-12)


def test_query_key_norm_forgets_the_scale_of_the_projections():
    kv = GQA(heads=4, kv_heads=2, head_dim=8, qk_norm=RMSNorm(eps=1e-12))
    layer = Layer(kv=kv, feed_forward=Dense(hidden=9))
    model, tokens_T = model_spec(layer).build(seed=1).double(), random_tokens(9)
    before_TP = run(model, tokens_T, [9])
    with torch.no_grad():
        model.blocks[0].attention.kv.q.weight.mul_(100)  # type: ignore[union-attr]
        model.blocks[0].attention.kv.k.weight.mul_(0.01)  # type: ignore[union-attr]
    close(run(model, tokens_T, [9]), before_TP, 1e-7)


def test_query_key_norm_bounds_the_scores():
    """|score| <= sqrt(K) whatever the rows are, at gain 1."""
    kv = GQA(heads=4, kv_heads=2, head_dim=8, qk_norm=RMSNorm())
    model = built(Full(), kv, layers=1)
    module = model.blocks[0].attention.kv  # type: ignore[union-attr]
    heads = module.project(1e3 * torch.randn(20, 10, dtype=torch.float64), Stream.of_lengths([20]))
    q, k = heads.q_THK, heads.k_TGK
    scores = torch.einsum("thk,shk->hts", q, k.repeat_interleave(2, 1)) * 8**-0.5
    assert scores.abs().max() <= 8**0.5 + 1e-9


def test_no_projected_channel_is_larger_than_the_clip():
    module = GQA(heads=4, kv_heads=2, head_dim=8, position=NoPE(), clip=0.3).build(10, FP32()).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    heads = module.project(torch.randn(20, 10, dtype=torch.float64), Stream.of_lengths([20]))
    for rows in (heads.q_THK, heads.k_TGK, heads.v_TGV):
        assert rows.abs().max() == 0.3 and (rows.abs() < 0.3).any()


def test_scale_is_what_scores_are_multiplied_by():
    assert built(Full(), GQA(heads=4, kv_heads=1, head_dim=6, scale=0.3)).blocks[0].attention.kv.scores.scale == 0.3  # type: ignore[union-attr]
    assert built(Full(), GQA(heads=4, kv_heads=1, head_dim=16)).blocks[0].attention.kv.scores.scale == 0.25  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"heads": 4, "kv_heads": 3, "head_dim": 8}, "kv_heads 3 must divide heads 4"),
        ({"heads": 4, "kv_heads": 2, "head_dim": 7}, "rotary width 7 must be even"),
        ({"heads": 4, "kv_heads": 2, "head_dim": 6, "position": RoPE(fraction=0.5)}, "rotary width 3 must be even"),
        ({"heads": 4, "kv_heads": 2, "head_dim": 16, "position": RoPE(fraction=0.01)}, "width 0 .* 0.01 of 16"),
        ({"heads": 4, "kv_heads": 2, "head_dim": 8, "clip": 1e300}, "clip .* expected what fp32 holds"),
        ({"heads": 0, "kv_heads": 1, "head_dim": 8}, "heads"),
        ({"heads": 4, "kv_heads": 2, "head_dim": 8, "scale": -1.0}, "scale"),
    ],
)
def test_impossible_heads_are_refused(fields, words):
    with pytest.raises(UsageError, match=words):
        GQA.parse(fields)
