"""Products of half precision where the CPU has none: torch's own as far as half precision can tell, gradients too."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sextant.core.stream import Stream
from sextant.kernels import attention, matmul
from sextant.kernels.attention.span import Scores, Span

HALVES = [torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("half_products")


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def near(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """One rounding of the result, and of sums that a native kernel may round on the way."""
    assert got.dtype == dtype and got.shape == exact.shape
    off = (got.double() - exact).abs().amax() if got.numel() else torch.tensor(0.0)
    assert off <= 2 * torch.finfo(dtype).eps * max(1.0, exact.abs().amax().item() if exact.numel() else 0.0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(), (1,), (0,), (7,), (2, 3), (1, 1)])
def test_linear_and_its_gradients_are_the_exact_ones_rounded(rows, bias, dtype):
    x, weight = leaf(*rows, 5, dtype=dtype), leaf(9, 5, dtype=dtype)
    terms = [x, weight, leaf(9, dtype=dtype)] if bias else [x, weight]
    exact_terms = [term.detach().double().requires_grad_() for term in terms]
    got, exact = matmul.linear(*terms), F.linear(*exact_terms)
    near(got, exact, dtype)
    dy = torch.randn_like(exact).to(dtype)
    wanted = torch.autograd.grad(exact, exact_terms, dy.double())
    for g, w in zip(torch.autograd.grad(got, terms, dy), wanted, strict=True):
        near(g, w, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(4, 5, 6), (1, 5, 6), (0, 5, 6), (3, 0, 2)])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_mm_and_its_gradients_are_the_exact_ones_rounded(shape, batch, dtype):
    n, k, m = shape
    a, b = leaf(*batch, n, k, dtype=dtype), leaf(*batch, m, k, dtype=dtype)
    exact_a, exact_b = (term.detach().double().requires_grad_() for term in (a, b))
    got, exact = matmul.mm(a, b.mT), exact_a @ exact_b.mT
    near(got, exact, dtype)
    dy = torch.randn_like(exact).to(dtype)
    wanted = torch.autograd.grad(exact, (exact_a, exact_b), dy.double())
    for g, w in zip(torch.autograd.grad(got, (a, b), dy), wanted, strict=True):
        near(g, w, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [0, 1, 6])
def test_mm_into_fills_rows_of_a_buffer_and_nothing_else(rows, dtype):
    a, b, buffer = torch.randn(rows, 5).to(dtype), torch.randn(5, 7).to(dtype), torch.full((8, 7), 3.0, dtype=dtype)
    got = matmul.mm_into(a, b, buffer[:rows])
    assert got.data_ptr() == buffer[:rows].data_ptr()
    near(buffer[:rows], a.double() @ b.double(), dtype)
    assert (buffer[rows:] == 3).all()


def test_single_and_double_precision_are_never_widened():
    for dtype in (torch.float32, torch.float64):
        x, weight = torch.randn(3, 5, dtype=dtype), torch.randn(4, 5, dtype=dtype)
        assert matmul.linear(x, weight).equal(F.linear(x, weight))
        assert matmul.mm(x, weight.t()).equal(x @ weight.t())


def test_only_wanted_gradients_are_made():
    x, weight = leaf(3, 5, dtype=torch.bfloat16), torch.randn(4, 5).bfloat16()
    matmul.linear(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is None


def test_a_compiler_follows():
    x, weight = leaf(3, 5, dtype=torch.bfloat16), leaf(4, 5, dtype=torch.bfloat16)
    compiled = torch.compile(matmul.linear, backend="aot_eager", fullgraph=True)
    grads = [torch.autograd.grad(f(x, weight).float().square().sum(), (x, weight)) for f in (compiled, matmul.linear)]
    for got, want in zip(*grads, strict=True):
        assert got.equal(want)


@pytest.mark.parametrize("window", [None, 3])
def test_attention_in_half_precision_has_the_exact_gradients(window):
    stream, scores = Stream.of_lengths([5, 5]), Scores(0.5)
    rows = [leaf(10, 2, 4, dtype=torch.bfloat16) for _ in range(3)]
    exact_rows = [row.detach().double().requires_grad_() for row in rows]
    dy = torch.randn(10, 2, 4).bfloat16()

    def grads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        o = attention.attend(q, attention.Keys(k, v), stream, Span(window), scores)
        return torch.autograd.grad(o, (q, k, v), dy.to(o.dtype))

    for got, want in zip(grads(*rows), grads(*exact_rows), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0.05, atol=0.03)
