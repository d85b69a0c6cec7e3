"""Attention over chosen blocks, by blocks and by queries, against the dense mask in fp64: results and gradients."""

import math

import pytest
import torch
from cases import close
from torch import Tensor

from sextant.kernels.attention import Scores, Span, attend_dense
from sextant.kernels.attention import selected as module
from sextant.kernels.attention.parts import SCORES_AT_ONCE, Part, attend_parts
from sextant.kernels.attention.selected import attend_selected, attend_selected_reference, attend_selected_sparse, cut

BLOCK, CHOSEN, K, V = 8, 3, 7, 5
HEADS = [(4, 2), (3, 1), (6, 6), (6, 2)]
LENGTHS = {
    "one token": (1, 1),
    "a block but one": (BLOCK - 1, BLOCK - 1),
    "a block": (BLOCK, BLOCK),
    "a block and one": (BLOCK + 1, BLOCK + 1),
    "three blocks and seven": (3 * BLOCK + 7, 3 * BLOCK + 7),
    "one token after many": (1, 3 * BLOCK + 2),
    "a chunk after many": (2 * BLOCK + 3, 5 * BLOCK + 1),
    "a chunk within a block": (3, 2 * BLOCK + 6),
}


@pytest.fixture(params=["by blocks", "by queries", "by blocks, small parts", "by queries, small parts"])
def path(request, monkeypatch):
    """Force one way to cut, with parts as large as they come or hardly any room."""
    monkeypatch.setattr(module, "_gathers", lambda choice: "queries" in request.param)
    if "small" in request.param:
        monkeypatch.setitem(SCORES_AT_ONCE, "cpu", 100)
        monkeypatch.setattr(cut, "GATHERED_BYTES", 5000)
        monkeypatch.setattr(cut, "CAUSAL_TILE", 3)


def choices(tokens: int, keys: int, choosers: int, block: int = BLOCK) -> Tensor:
    """Random blocks without one twice, some of the future, the current one often, and -1 in a fifth of the places."""
    count = -(-keys // block)
    order_THM = torch.rand(tokens, choosers, max(count, CHOSEN)).argsort(-1)
    blocks_THJ = order_THM[..., :CHOSEN].masked_fill(order_THM[..., :CHOSEN] >= count, -1)
    current_T1 = (torch.arange(keys - tokens, keys) // block)[:, None]
    missing_TH = (blocks_THJ != current_T1[..., None]).all(-1) & (torch.rand(tokens, choosers) < 0.7)
    blocks_THJ[..., 0] = torch.where(missing_TH, current_T1, blocks_THJ[..., 0])
    return blocks_THJ.masked_fill(torch.rand(blocks_THJ.shape) < 0.2, -1)


def rows(tokens: int, keys: int, heads: int, groups: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    shapes = (tokens, heads, K), (keys, groups, K), (keys, groups, V)
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


def results(attention, inputs, weights, *rest) -> list[Tensor]:
    """``o``, ``lse`` (0 for rows that read nothing) and the gradients of a weighted sum of both."""
    o, lse = attention(*inputs, *rest)
    lse = lse.where(lse > -math.inf, 0.0)
    loss = (o.to(weights[0].dtype) * weights[0]).sum() + (lse * weights[1]).sum()
    return [o, lse, *torch.autograd.grad(loss, inputs)]


def weights(tokens: int, heads: int) -> tuple[Tensor, Tensor]:
    return torch.randn(tokens, heads, V, dtype=torch.float64), torch.randn(heads, tokens, dtype=torch.float64)


@pytest.mark.parametrize("per", ["head", "group", "all"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.usefixtures("path")
def test_equals_the_reference(lengths, heads, per):
    """Also T8: gradients from the merged output and log-sum-exp are those of autograd. Two of the shapes have ALiBi."""
    slopes_H = torch.rand(heads[0], dtype=torch.float64) if heads[0] // heads[1] == 3 else None
    inputs, weight = rows(*lengths, *heads), weights(lengths[0], heads[0])
    rest = choices(*lengths, {"head": heads[0], "group": heads[1], "all": 1}[per]), BLOCK, Scores(0.4, slopes_H)
    want = results(attend_selected_reference, inputs, weight, *rest)
    for got, wanted in zip(results(attend_selected_sparse, inputs, weight, *rest), want, strict=True):
        close(got, wanted, 1e-10)


@pytest.mark.parametrize("block", [1, 2, 5, 16, 64])
@pytest.mark.usefixtures("path")
def test_blocks_of_any_length(block):
    inputs, weight = rows(29, 37, 6, 2), weights(29, 6)
    rest = choices(29, 37, 2, block), block, Scores(0.4)
    want = results(attend_selected_reference, inputs, weight, *rest)
    for got, wanted in zip(results(attend_selected_sparse, inputs, weight, *rest), want, strict=True):
        close(got, wanted, 1e-10)


@pytest.mark.parametrize("tokens", [1, 31])
@pytest.mark.usefixtures("path")
def test_fp32(tokens):
    inputs, weight = rows(tokens, 31, 4, 2, torch.float32), [x.float() for x in weights(tokens, 4)]
    rest = choices(tokens, 31, 4), BLOCK, Scores(0.4)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = results(attend_selected_reference, exact, [x.double() for x in weight], *rest)
    for got, wanted in zip(results(attend_selected_sparse, inputs, weight, *rest), want, strict=True):
        close(got.double(), wanted, 1e-5)


@pytest.mark.usefixtures("path")
def test_bf16_is_as_good_as_the_reference_in_bf16():
    """At most three times its error; scores and statistics are fp32 in both."""
    inputs, weight = rows(47, 47, 4, 2, torch.bfloat16), weights(47, 4)
    rest = choices(47, 47, 4), BLOCK, Scores(0.4)
    want = results(attend_selected_reference, [x.detach().double().requires_grad_() for x in inputs], weight, *rest)
    dense = results(attend_selected_reference, inputs, weight, *rest)
    for got, rival, wanted in zip(results(attend_selected_sparse, inputs, weight, *rest), dense, want, strict=True):
        assert got.dtype == rival.dtype
        assert (got - wanted).norm() <= 3 * (rival - wanted).norm() + 1e-6 * wanted.norm()


@pytest.mark.usefixtures("path")
def test_all_blocks_equal_full_attention():
    """T1."""
    inputs, weight = rows(45, 45, 6, 2), weights(45, 6)
    every_THJ = torch.arange(6).expand(45, 1, 6)
    seen = torch.ones(45, 45, dtype=torch.bool).tril()
    want = results(attend_dense, inputs, weight, seen, Scores(0.4))
    got_all = results(attend_selected_sparse, inputs, weight, every_THJ, BLOCK, Scores(0.4))
    for got, wanted in zip(got_all, want, strict=True):
        close(got, wanted, 1e-12)


@pytest.mark.usefixtures("path")
def test_what_is_never_chosen_has_no_gradient_and_what_reads_nothing_gives_zero():
    q, k, v = rows(40, 40, 4, 2)
    blocks_THJ = torch.full((40, 4, 2), -1)
    blocks_THJ[:30, :, 0] = torch.arange(30)[:, None] // BLOCK
    blocks_THJ[16:, :, 1] = 0
    blocks_THJ[39] = -1
    o, lse = attend_selected_sparse(q, k, v, blocks_THJ, BLOCK, Scores(0.4))
    assert o[39].eq(0).all() and lse[:, 39].eq(-math.inf).all()
    dq, dk, dv = torch.autograd.grad(o.sum() + lse[:, :39].sum(), (q, k, v))
    assert dq[39].eq(0).all() and dk[30:].eq(0).all() and dv[30:].eq(0).all()
    assert dv[:30].ne(0).any(-1).all()


@pytest.mark.usefixtures("path")
def test_constant_keys_average_what_is_read():
    q, k, v = rows(29, 29, 4, 2)
    blocks_THJ = choices(29, 29, 4)
    o, lse = attend_selected_sparse(q, k[:1].expand_as(k).contiguous(), v, blocks_THJ, BLOCK, Scores(0.4))
    seen_HTS = module.selected_mask(blocks_THJ, BLOCK, 29, 4) & torch.ones(29, 29, dtype=torch.bool).tril()
    mean = torch.einsum("hts,shv->thv", seen_HTS.double(), v.repeat_interleave(2, 1))
    close(o, mean / seen_HTS.sum(-1).clamp_min(1).t()[..., None], 1e-12)
    assert lse.isfinite().equal(seen_HTS.any(-1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.usefixtures("path")
def test_huge_scores_stay_finite(dtype):
    """T7: log-sum-exps of +-1e4 and more."""
    q, k, v = rows(29, 29, 4, 2, dtype)
    huge = 1e4 * k.detach()
    o, lse = attend_selected_sparse(q, huge, v, choices(29, 29, 4), BLOCK, Scores(1.0))
    assert o.isfinite().all() and not lse.isnan().any() and lse.abs().nan_to_num(posinf=0).max() > 1e4
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(o.sum(), (q, v)))


def test_parts_merge_in_any_order():
    """T7: disjoint parts, empty ones among them."""
    inputs, weight = rows(9, 21, 4, 2), weights(9, 4)
    keys = [torch.arange(start, stop) for start, stop in ((0, 1), (1, 9), (9, 20), (20, 21))]
    parts = []
    for group in range(2):
        rows_T = (torch.arange(9)[:, None] * 4 + torch.tensor([2 * group, 2 * group + 1])).flatten()
        for k_S in keys:
            parts.append(Part(rows_T[None], k_S[None] * 2 + group))
            parts.append(Part(rows_T[None], k_S[None] * 2 + group, torch.zeros(1, 1, 1, dtype=torch.bool)))
    want = results(attend_dense, inputs, weight, torch.ones(9, 21, dtype=torch.bool), Scores(0.4))
    for order in (parts, parts[::-1], parts[3:] + parts[:3]):
        got = results(attend_parts, inputs, weight, lambda order=order: order, Scores(0.4))
        for g, w in zip(got, want, strict=True):
            close(g, w, 1e-12)


def test_no_parts_at_all():
    q, k, v = rows(3, 5, 4, 2)
    o, lse = attend_parts(q, k, v, lambda: [], Scores(1.0))
    assert o.eq(0).all() and lse.eq(-math.inf).all()
    assert all(grad.eq(0).all() for grad in torch.autograd.grad(o.sum(), (q, k, v)))


def kept_bytes(tokens: int) -> int:
    """Bytes that autograd keeps for backward."""
    inputs, kept = rows(tokens, tokens, 4, 2, torch.float32), {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    blocks_THJ = choices(tokens, tokens, 4, 64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        held = attend_selected(*inputs, blocks_THJ, 64, Scores(0.4))
    del held
    return sum(kept.values())


def test_what_is_kept_grows_with_the_length():
    """q, k, v, o (with one row for none) and the log-sum-exp; nothing of T x S."""
    for tokens in (1024, 2048):
        assert kept_bytes(tokens) == 4 * tokens * (4 * K + 2 * (K + V) + 4 * V + 4) + 4 * V


def largest_part(tokens: int) -> int:
    q, k, _ = rows(tokens, tokens, 4, 2, torch.float32)
    choice = cut.Choice.of(q, k, choices(tokens, tokens, 4, 64), 64)
    parts = [*cut.by_blocks(cut.Inverted.of(choice)), *cut.by_queries(choice, 4 * (K + V))]
    return max(part.rows_MT.numel() * part.keys_MS.shape[1] for part in parts)


def test_parts_do_not_grow_with_the_length(monkeypatch):
    monkeypatch.setitem(SCORES_AT_ONCE, "cpu", 2**14)
    monkeypatch.setattr(cut, "GATHERED_BYTES", 2**18)
    assert largest_part(2048) <= 2**14


def test_work_grows_with_what_is_chosen():
    """Pairs of query and key over all parts: those chosen, and half a strip of the causal blocks too many."""
    q, k, _ = rows(2048, 2048, 4, 2, torch.float32)
    blocks_THJ = torch.full((2048, 4, 2), -1)
    blocks_THJ[..., 0] = torch.arange(2048)[:, None] // 256
    blocks_THJ[1024:, :, 1] = torch.randint(0, 4, (1024, 4))
    parts = list(cut.by_blocks(cut.Inverted.of(cut.Choice.of(q, k, blocks_THJ, 256))))
    pairs = sum(part.rows_MT.ne(2048 * 4).sum().item() * part.keys_MS.shape[1] for part in parts)
    strips = 2048 * 4 * (128 + 256) // 2
    assert pairs == strips + 1024 * 4 * 256


def test_short_sequences_take_the_dense_mask_and_long_ones_do_not(monkeypatch):
    taken = []
    monkeypatch.setattr(module, "attend_selected_reference", lambda *_: taken.append("dense"))
    monkeypatch.setattr(module, "attend_selected_sparse", lambda *_: taken.append("sparse"))
    for tokens, keys in ((64, 64), (256, 256), (257, 256 + 64), (1, 4096)):
        attend_selected(*rows(tokens, keys, 4, 2), choices(tokens, keys, 4, 64), 64, Scores(0.4))
    assert taken == ["dense", "dense", "sparse", "sparse"]


def test_two_runs_agree_bit_for_bit():
    inputs, weight = rows(200, 200, 4, 2, torch.float32), [x.float() for x in weights(200, 4)]
    rest = choices(200, 200, 4), BLOCK, Scores(0.4)
    first, second = (results(attend_selected_sparse, inputs, weight, *rest) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_a_window_of_blocks_equals_a_span():
    """A choice of the current and the previous block, cut at the window, is no other mask than a span's."""
    q, k, v = rows(40, 40, 4, 2)
    current_T = torch.arange(40) // BLOCK
    blocks_THJ = torch.stack([current_T, current_T - 1], -1)[:, None]
    o, _ = attend_selected_sparse(q, k, v, blocks_THJ, BLOCK, Scores(0.4))
    place = torch.arange(40)
    mask = Span().visible(place, place) & (place[:, None] // BLOCK - place // BLOCK <= 1)
    close(o, attend_dense(q, k, v, mask, Scores(0.4))[0], 1e-12)
