"""Grouped products and the permutation around them: against loops, finite differences, and with every odd load."""

import pytest
import torch
from cases import close
from torch import Tensor

from sextant.kernels.grouped import (
    grouped_linear,
    grouped_linear_reference,
    grouped_swiglu,
    grouped_swiglu_reference,
)
from sextant.kernels.permute import combine, dispatch, plan

COUNTS = {
    "even": [3, 3, 3],
    "odd": [1, 0, 7, 2],
    "all to one": [0, 0, 9],
    "first and last empty": [0, 4, 5, 0],
    "one row": [0, 1],
    "no rows": [0, 0, 0],
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_grouped_linear_equals_the_reference(counts):
    x = torch.randn(sum(counts), 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(len(counts), 6, 4, dtype=torch.float64, requires_grad=True)
    weight, counts_E = torch.randn(sum(counts), 4, dtype=torch.float64), torch.tensor(counts)
    got, want = grouped_linear(x, w, counts_E), grouped_linear_reference(x, w, counts_E)
    close(got, want, 1e-13)
    got_grads = torch.autograd.grad((got * weight).sum(), (x, w))
    for g, r in zip(got_grads, torch.autograd.grad((want * weight).sum(), (x, w)), strict=True):
        close(g, r, 1e-13)
    assert all((got_grads[1][e] == 0).all() for e, count in enumerate(counts) if not count)


def test_grouped_linear_gradient_equals_finite_differences():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, torch.tensor([2, 0, 3])), (x, w))


def test_grouped_linear_takes_a_transposed_gradient():
    """A gradient that is not contiguous, as a transpose after the product makes it."""
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    counts_E, weight = torch.tensor([2, 3]), torch.randn(4, 5, dtype=torch.float64)
    got = torch.autograd.grad((grouped_linear(x, w, counts_E).t() * weight).sum(), (x, w))
    want = torch.autograd.grad((grouped_linear_reference(x, w, counts_E).t() * weight).sum(), (x, w))
    close(got[0], want[0], 1e-13)
    close(got[1], want[1], 1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_swiglu_as_a_whole_equals_its_parts(counts, dtype):
    """Values and all three gradients; in bf16 too, because every step rounds as the parts do."""
    x = torch.randn(sum(counts), 6).to(dtype).requires_grad_()
    up, down = torch.randn(len(counts), 6, 10, requires_grad=True), torch.randn(len(counts), 5, 6, requires_grad=True)
    weight, counts_E = torch.randn(sum(counts), 6).to(dtype), torch.tensor(counts)
    got, want = grouped_swiglu(x, up, down, counts_E), grouped_swiglu_reference(x, up, down, counts_E)
    bound = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    close(got, want, bound)
    got_grads = torch.autograd.grad(got, (x, up, down), weight)
    for g, w in zip(got_grads, torch.autograd.grad(want, (x, up, down), weight), strict=True):
        close(g, w, bound)
    assert all((grad[e] == 0).all() for grad in got_grads[1:] for e, count in enumerate(counts) if not count)


def test_swiglu_gradient_equals_finite_differences():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    up = torch.randn(3, 3, 4, dtype=torch.float64, requires_grad=True)
    down = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    counts_E = torch.tensor([2, 0, 3])
    assert torch.autograd.gradcheck(lambda x, up, down: grouped_swiglu(x, up, down, counts_E), (x, up, down))


def test_swiglu_takes_a_transposed_gradient():
    x, counts_E = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([2, 3])
    up, down = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    weight = torch.randn(3, 5, dtype=torch.float64).t()
    (got,) = torch.autograd.grad(grouped_swiglu(x, up, down, counts_E), x, weight)
    (want,) = torch.autograd.grad(grouped_swiglu_reference(x, up, down, counts_E), x, weight)
    close(got, want, 1e-13)


@pytest.mark.parametrize("tile", [1, 4])
@pytest.mark.parametrize(("tokens", "chosen", "experts"), [(11, 2, 5), (1, 3, 3), (0, 2, 3)])
def test_gradients_of_the_way_out_and_back_equal_plain_operations(tokens, chosen, experts, tile):
    experts_TA = choices(tokens, chosen, experts)
    where = plan(experts_TA, experts, tile)
    x, gates = torch.randn(tokens, 3, requires_grad=True), torch.rand(tokens, chosen, requires_grad=True)
    scale_N1, weight = torch.rand(len(where.source_N), 1), torch.randn(tokens, 3)
    got = combine(dispatch(x, where, chosen) * scale_N1, gates, where)
    want = (x[:, None] * scale_N1[where.row_N].unflatten(0, (tokens, chosen)) * gates[..., None]).sum(1)
    close(got, want, 1e-6)
    got_grads = torch.autograd.grad(got, (x, gates), weight)
    for g, w in zip(got_grads, torch.autograd.grad(want, (x, gates), weight), strict=True):
        close(g, w, 1e-5)


def choices(tokens: int, chosen: int, experts: int) -> Tensor:
    """Distinct random experts of each token."""
    return torch.rand(tokens, experts).argsort(-1)[:, :chosen]


@pytest.mark.parametrize("tile", [1, 4, 32])
@pytest.mark.parametrize(("tokens", "chosen", "experts"), [(11, 2, 5), (1, 3, 3), (6, 1, 9), (7, 4, 4)])
def test_round_trip(tokens, chosen, experts, tile):
    """Out and back with gates of 1/A is the identity, in any tile."""
    x_TD = torch.randn(tokens, 3, dtype=torch.float64)
    where = plan(choices(tokens, chosen, experts), experts, tile)
    gates_TA = torch.full((tokens, chosen), 1 / chosen, dtype=torch.float64)
    close(combine(dispatch(x_TD, where, chosen), gates_TA, where), x_TD, 1e-14)


@pytest.mark.parametrize("tile", [1, 4])
def test_rows_lie_by_expert_and_by_token(tile):
    experts_TA = choices(13, 3, 6)
    where = plan(experts_TA, 6, tile)
    token_TD = torch.arange(13, dtype=torch.float64)[:, None] + 1
    rows_ND = dispatch(token_TD, where, 3)
    counts = experts_TA.flatten().bincount(minlength=6).tolist()
    assert where.counts_E.tolist() == [-(-n // tile) * tile for n in counts]
    for expert, rows in enumerate(rows_ND.split(where.counts_E.tolist())):
        sent = (experts_TA == expert).any(1).nonzero()[:, 0] + 1
        assert rows[rows > 0].tolist() == sent.tolist()
        assert (rows[len(sent) :] == 0).all()


@pytest.mark.parametrize("tile", [1, 3])
def test_gradients_of_the_round_trip_equal_finite_differences(tile):
    experts_TA = choices(4, 2, 3)
    where = plan(experts_TA, 3, tile)
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    scale_N = torch.rand(len(where.source_N), 1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, g: combine(dispatch(x, where, 2) * scale_N, g, where), (x, gates))


def test_combine_is_fp32_over_half_precision_rows():
    experts_TA = choices(9, 4, 6)
    where = plan(experts_TA, 6)
    rows_ND = torch.randn(36, 8).bfloat16()
    gates_TA = torch.rand(9, 4)
    got = combine(rows_ND, gates_TA, where)
    want = (rows_ND.double()[where.row_N].unflatten(0, (9, 4)) * gates_TA.double()[..., None]).sum(1)
    assert got.dtype == torch.float32
    close(got.double(), want, 1e-6)


@pytest.mark.parametrize("copies", [1, 3])
def test_rows_by_themselves_equal_rows_by_expert(copies: int) -> None:
    """The path of a decoding step against the general one."""
    from sextant.kernels.grouped import row_linear

    experts = [3, 0, 3, 2, 0][: 2 * copies]
    x_ND, weight_EDF = torch.randn(len(experts), 6, dtype=torch.float64), torch.randn(4, 6, 5, dtype=torch.float64)
    rows = torch.stack([x_ND[n] @ weight_EDF[expert] for n, expert in enumerate(experts)])
    torch.testing.assert_close(row_linear(x_ND, weight_EDF, experts), rows)
