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
    padded_grouped_mm,
    padded_grouped_outer,
)
from sextant.kernels.permute import Plan, combine, dispatch, plan
from sextant.kernels.permute.rounds import in_rounds

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


@pytest.mark.parametrize("widths", [(12, 20), (16, 8), (13, 7)], ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_a_device_s_product_takes_any_widths_and_no_rows(counts, widths):
    """Its library wants multiples of 16 bytes and at least one row; here it runs on a CPU, by the same lines."""
    x = torch.randn(sum(counts), widths[0], dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(len(counts), *widths, dtype=torch.bfloat16, requires_grad=True)
    counts_E, weight = torch.tensor(counts), torch.randn(sum(counts), widths[1], dtype=torch.bfloat16)
    y_NF, want_NF = padded_grouped_mm(x, w, counts_E), grouped_linear_reference(x, w, counts_E)
    assert y_NF.shape == want_NF.shape
    got = [y_NF, *torch.autograd.grad(y_NF, (x, w), weight)]
    want = [want_NF, *torch.autograd.grad(want_NF, (x, w), weight)]
    for g, r in zip([*got, padded_grouped_outer(x, weight, counts_E)], [*want, want[2]], strict=True):
        close(g.double(), r.double(), 2e-2)


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


KEPT = {
    "some": lambda shape: torch.rand(shape) < 0.6,
    "all": lambda shape: torch.ones(shape, dtype=torch.bool),
    "none": lambda shape: torch.zeros(shape, dtype=torch.bool),
    "one": lambda shape: torch.arange(shape[0] * shape[1]).view(shape) == shape[0] * shape[1] - 1,
}
TILED = [{}, {"tile": 4}, {"least": 3}, {"tile": 2, "least": 5}]
SHAPES = [(11, 2, 5), (1, 3, 3), (6, 1, 9), (0, 2, 3)]


def by_hand(x_TD: Tensor, gates_TA: Tensor, kept_TA: Tensor, scale_N1: Tensor, where: Plan) -> Tensor:
    """Every kept copy scaled by its row and weighted by its gate, one after another."""
    sums = []
    for token, x in enumerate(x_TD):
        copies = zip(where.row_N.view_as(gates_TA)[token], gates_TA[token], kept_TA[token], strict=True)
        copies = [(x * scale_N1[row], gate) for row, gate, kept in copies if kept]
        sums.append(sum((y * gate for y, gate in copies), torch.zeros_like(x)))
    return torch.stack(sums) if sums else x_TD * 1


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("how", TILED, ids=str)
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize(("tokens", "chosen", "experts"), SHAPES)
def test_dropped_copies_have_no_row_and_no_gradient(tokens, chosen, experts, kept, how, compiling, monkeypatch):
    """Values and gradients of both paths against a loop over copies; what compilers see is plain operations."""
    experts_TA, kept_TA = choices(tokens, chosen, experts), KEPT[kept]((tokens, chosen))
    where = plan(experts_TA, experts, kept_TA=kept_TA, **how)
    assert len(where.source_N) - where.padding == kept_TA.sum()
    x = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(tokens, chosen, dtype=torch.float64, requires_grad=True)
    scale_N1, weight = torch.rand(len(where.source_N), 1, dtype=torch.float64), torch.randn(tokens, 3).double()
    want = by_hand(x, gates, kept_TA, scale_N1, where)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: compiling)
    got = combine(dispatch(x, where, chosen) * scale_N1, gates, where)
    close(got, want, 1e-13)
    got_grads = torch.autograd.grad(got, (x, gates), weight)
    want_grads = torch.autograd.grad((want * weight).sum() + 0 * (gates.sum() + x.sum()), (x, gates))
    for g, w in zip(got_grads, want_grads, strict=True):
        close(g, w, 1e-13)
    assert (got_grads[1][~kept_TA] == 0).all()
    with torch.no_grad():
        close(combine(dispatch(x, where, chosen) * scale_N1, gates, where), want, 1e-13)


@pytest.mark.parametrize("compiling", [False, True])
def test_what_is_dropped_cannot_spoil_a_sum(compiling, monkeypatch):
    """A row that is not finite reaches its own token and no token that dropped a copy."""
    experts_TA, kept_TA = choices(9, 2, 4), torch.rand(9, 2) < 0.5
    kept_TA[0] = torch.tensor([True, False])
    where = plan(experts_TA, 4, kept_TA=kept_TA)
    owner = int(where.source_N[0]) // 2
    y = torch.randn(len(where.source_N), 3)
    y[0] = torch.nan
    y.requires_grad_()
    gates = torch.rand(9, 2, requires_grad=True)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: compiling)
    out = combine(y, gates, where)
    assert out.isfinite().all(1).tolist() == [token != owner for token in range(9)]
    _, dgates = torch.autograd.grad(out, (y, gates), torch.ones(9, 3))
    assert dgates.isfinite().all(1).tolist() == [token != owner for token in range(9)]


@pytest.mark.parametrize("how", TILED, ids=str)
def test_kept_rows_lie_by_expert_and_by_token(how):
    experts_TA, kept_TA = choices(13, 3, 6), torch.rand(13, 3) < 0.5
    where = plan(experts_TA, 6, kept_TA=kept_TA, **how)
    rows_ND = dispatch(torch.arange(13, dtype=torch.float64)[:, None] + 1, where, 3)
    tile, least = how.get("tile", 1), how.get("least", 0)
    for expert, rows in enumerate(rows_ND.split(where.counts_E.tolist())):
        sent = ((experts_TA == expert) & kept_TA).any(1).nonzero()[:, 0] + 1
        assert rows[rows > 0].tolist() == sent.tolist()
        assert len(rows) == -(-max(len(sent), least) // tile) * tile


def test_compilers_follow_with_drops():
    """Through torch.compile itself: the same values and gradients as without."""
    experts_TA, kept_TA = choices(7, 2, 4), torch.rand(7, 2) < 0.6
    x, gates = torch.randn(7, 3, requires_grad=True), torch.rand(7, 2, requires_grad=True)

    def there_and_back(x, gates):
        where = plan(experts_TA, 4, kept_TA=kept_TA)
        return combine(dispatch(x, where, 2).sin(), gates, where)

    want = there_and_back(x, gates)
    got = torch.compile(there_and_back, backend="aot_eager")(x, gates)
    close(got, want, 1e-6)
    weight = torch.randn(7, 3)
    for g, w in zip(*(torch.autograd.grad(out, (x, gates), weight) for out in (got, want)), strict=True):
        close(g, w, 1e-6)


def mixture(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Matrices of five experts of width 3 on rows of 4."""
    up = torch.randn(5, 4, 6).to(dtype).requires_grad_()
    return up, torch.randn(5, 3, 4).to(dtype).requires_grad_()


def one(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gate, value = (x @ up).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * value) @ down


@pytest.mark.parametrize("cap", [4, 8, 400])
@pytest.mark.parametrize("kept", [None, *KEPT])
@pytest.mark.parametrize("tokens", [0, 1, 11])
def test_rounds_equal_sorted_rows(tokens, kept, cap):
    """Values and the gradients by tokens, gates and both stacks."""
    experts_TA, (up, down) = choices(tokens, 2, 5), mixture()
    kept_TA = None if kept is None else KEPT[kept]((tokens, 2))
    x = torch.randn(tokens, 4, dtype=torch.float64, requires_grad=True)
    gates, weight = torch.rand(tokens, 2, dtype=torch.float64, requires_grad=True), torch.randn(tokens, 4).double()
    where = plan(experts_TA, 5, 4, kept_TA)
    got = in_rounds(one, x, gates, (up, down), where, 4, cap)
    plain = plan(experts_TA, 5, kept_TA=kept_TA)
    rows = grouped_swiglu_reference(dispatch(x, plain, 2), up, down, plain.counts_E)
    want = combine(rows, gates, plain)
    close(got, want, 1e-12)
    inputs = (x, gates, up, down)
    for g, w in zip(*(torch.autograd.grad(out, inputs, weight) for out in (got, want)), strict=True):
        close(g, w, 1e-12)


def test_rounds_gradient_equals_finite_differences():
    experts_TA, stacks = choices(5, 2, 5), mixture()
    where = plan(experts_TA, 5, 2)
    x, gates = torch.randn(5, 4).double().requires_grad_(), torch.rand(5, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, g, *w: in_rounds(one, x, g, w, where, 2, 6), (x, gates, *stacks))


def test_no_product_of_a_round_has_other_rows_than_a_tile():
    """And no more rows than the cap are gathered at once, forward and backward, with all copies at one expert."""
    seen: list[int] = []
    experts_TA, stacks = torch.zeros(21, 1, dtype=torch.int64), mixture()

    def watched(x, up, down):
        seen.append(len(x))
        return one(x, up, down)

    x, gates = torch.randn(21, 4).double().requires_grad_(), torch.rand(21, 1).double()
    out = in_rounds(watched, x, gates, stacks, plan(experts_TA, 5, 4), 4, 8)
    assert seen == [4] * 6
    out.sum().backward()
    assert seen == [4] * 12
