"""Every path of attention over a span against the dense reference in fp64, outputs and gradients; the reference itself
against plain loops over numbers."""

import math

import pytest
import torch
from cases import close
from torch import Tensor

from sextant.core.state import Keys, Memory, RowSpec
from sextant.core.stream import Stream
from sextant.kernels.attention import Scores, Span, attend, attend_dense, attend_ragged

H, G, K, V = 6, 2, 8, 5
SPANS = {
    "full": Span(),
    "longer than any sequence": Span(64),
    "blocked": Span(4),
    "one block short of two": Span(7),
    "only itself": Span(1),
    "sinks": Span(3, sinks=2),
    "more sinks than window": Span(1, sinks=4),
}
LAYOUTS = {
    "one sequence": [13],
    "equal rows": [9, 9, 9],
    "exact multiple of the window": [8, 8],
    "runs of equal lengths": [5, 5, 12, 12, 12, 1],
    "ragged with empty ones": [3, 0, 11, 1, 0, 7],
    "only single tokens": [1, 1, 1],
}


def rows(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Random ``q_THK``, ``k_TGK``, ``v_TGV`` that want gradients."""
    shapes = (tokens, H, K), (tokens, G, K), (tokens, G, V)
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return q, k, v


def scores(with_slopes: bool) -> Scores:
    return Scores(0.4, torch.rand(H, dtype=torch.float64) if with_slopes else None)


@pytest.mark.parametrize("with_slopes", [False, True], ids=["dot", "alibi"])
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("span", SPANS.values(), ids=SPANS)
def test_fast_paths_equal_the_reference(span, lengths, with_slopes):
    q, k, v = rows(sum(lengths))
    how, weight = scores(with_slopes), torch.randn(sum(lengths), H, V, dtype=torch.float64)
    got = attend(q, Keys(k, v), Stream.of_lengths(lengths), span, how)
    want = attend_ragged(q, k, v, lengths, span, how)
    close(got, want)
    got_grads = torch.autograd.grad((got * weight).sum(), (q, k, v))
    for g, w in zip(got_grads, torch.autograd.grad((want * weight).sum(), (q, k, v)), strict=True):
        close(g, w)


@pytest.mark.parametrize("with_slopes", [False, True], ids=["dot", "alibi"])
@pytest.mark.parametrize("steps", [[[5, 5], [1, 1], [4, 4], [1, 1], [1, 1]], [[7, 2], [1, 1], [0, 3], [1, 0], [1, 1]]])
@pytest.mark.parametrize("span", SPANS.values(), ids=SPANS)
def test_buffers_equal_the_reference(span, steps, with_slopes):
    """Chunks and single steps over decoding states of two sequences."""
    totals = [sum(step[b] for step in steps) for b in range(2)]
    how, data = scores(with_slopes), [rows(total) for total in totals]
    memory = Memory([RowSpec(G, K, V, span.window, span.sinks)], 2, torch.float64)
    got: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for lengths in steps:
            stream = Stream.of_lengths(lengths, memory=memory)
            here = [slice(a, a + n) for a, n in zip(memory.lengths, lengths, strict=True)]
            q, k, v = (torch.cat([data[b][i][here[b]] for b in range(2)]) for i in range(3))
            keys = memory.layers[0].append(k, v, stream)
            for b, piece in enumerate(attend(q, keys, stream, span, how).split(lengths)):
                got[b].append(piece)
            memory.commit(stream)
        for b in range(2):
            close(torch.cat(got[b]), attend_ragged(*data[b], [totals[b]], span, how))


def test_reference_equals_loops_over_numbers():
    """Scalar arithmetic from the definition: exp(score) over the visible keys, divided by their sum."""
    q, k, v = (x.detach() for x in rows(6))
    span, how = Span(3, sinks=1), scores(True)
    got = attend_ragged(q, k, v, [6], span, how)
    assert how.slopes_H is not None
    for t in range(6):
        for h in range(H):
            seen = [s for s in range(t + 1) if t - s < 3 or s < 1]
            g, slope = h // (H // G), float(how.slopes_H[h])
            weights = [math.exp(0.4 * float(q[t, h] @ k[s, g]) - slope * (t - s)) for s in seen]
            for c in range(V):
                want = sum(w * float(v[s, g, c]) for w, s in zip(weights, seen, strict=True)) / sum(weights)
                assert float(got[t, h, c]) == pytest.approx(want, rel=1e-12)


def test_reference_gives_zero_where_nothing_is_visible():
    q, k, v = rows(4)
    mask_TS = torch.tril(torch.ones(4, 4, dtype=torch.bool))
    mask_TS[2] = False
    o_THV, lse_HT = attend_dense(q, k, v, mask_TS, Scores(0.4))
    assert (o_THV[2] == 0).all()
    assert (lse_HT[:, 2] == -math.inf).all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(o_THV.sum(), (q, k, v)))


def test_reference_gradients_equal_finite_differences():
    q, k, v = (torch.randn(4, n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2))
    slopes_H = torch.rand(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *qkv: attend_ragged(*qkv, [1, 3], Span(2), Scores(0.7, slopes_H)), (q, k, v)
    )


@pytest.mark.parametrize("span", SPANS.values(), ids=SPANS)
def test_gradients_of_the_fast_paths_equal_finite_differences(span):
    q, k, v = (torch.randn(9, n, 2, dtype=torch.float64, requires_grad=True) for n in (2, 1, 1))
    stream = Stream.of_lengths([9])
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, Keys(k, v), stream, span, Scores(0.7)), (q, k, v))


def test_masks_made_while_evaluating_serve_training():
    """Masks are kept between calls; one made in inference mode must not spoil a later backward."""
    span, stream = Span(5), Stream.of_lengths([16])
    with torch.inference_mode():
        q, k, v = rows(16)
        attend(q, Keys(k, v), stream, span, Scores(0.4))
    q, k, v = rows(16)
    attend(q, Keys(k, v), stream, span, Scores(0.4)).sum().backward()
    assert q.grad is not None and q.grad.abs().sum() > 0


@pytest.mark.parametrize("span", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 9, 40])
def test_mean_keys_is_the_mean_of_the_mask(span, tokens):
    """What the budget counts is what the mask shows."""
    position = torch.arange(tokens)
    seen = span.visible(position, position)
    assert span.mean_keys(tokens) == pytest.approx(float(seen.sum()) / tokens, rel=1e-12)


def test_span_by_definition():
    """Token t sees s with 0 <= t - s < W, and the sinks; a negative position is an empty slot."""
    seen = Span(3, sinks=1).visible(torch.tensor([7]), torch.tensor([-1, 0, 1, 4, 5, 6, 7, 8]))
    assert seen.tolist() == [[False, True, False, False, True, True, True, False]]


@pytest.mark.parametrize("v_dim", [K, V])
@pytest.mark.parametrize("with_slopes", [False, True], ids=["dot", "alibi"])
def test_half_precision_scores_are_normalised_in_fp32(with_slopes, v_dim):
    """bf16 rows: little is lost beyond rounding the output, and that is far below what bf16 scores would lose."""
    q, k = (x.detach().bfloat16() for x in rows(96)[:2])
    v, slopes_H = torch.randn(96, G, v_dim).bfloat16(), torch.rand(H) if with_slopes else None
    how = Scores(2.0, slopes_H)
    want = attend_ragged(q.double(), k.double(), v.double(), [96], Span(), how)
    got = attend(q, Keys(k, v), Stream.of_lengths([96]), Span(), how).double()
    assert rms(got - want) < 1.3 * rms(want.bfloat16().double() - want)
    assert rms(with_rounded_scores(q, k, v, how) - want) > 1.5 * rms(got - want)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def with_rounded_scores(q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, how: Scores) -> Tensor:
    """What attention would give if its scores were held in bf16: fp64 ``o_THV``."""
    k_SHK, v_SHV = (x.double().repeat_interleave(H // G, 1) for x in (k_SGK, v_SGV))
    scores_HTS = torch.einsum("thk,shk->hts", q_THK.double(), k_SHK) * how.scale
    distance_TS = (torch.arange(96)[:, None] - torch.arange(96)).double()
    if how.slopes_H is not None:
        scores_HTS -= how.slopes_H[:, None, None] * distance_TS
    rounded_HTS = scores_HTS.bfloat16().double().masked_fill(distance_TS < 0, -math.inf)
    return torch.einsum("hts,shv->thv", rounded_HTS.softmax(-1), v_SHV)
