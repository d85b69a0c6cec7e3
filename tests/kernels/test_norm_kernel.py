"""The norm with its own backward against autograd through the definition, and against finite differences."""

import pytest
import torch
from cases import close

from sextant.kernels.norm import rms_norm, rms_norm_reference


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 6), (1, 1), (0, 4)], ids=str)
def test_equals_the_reference(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gain_D = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape, dtype=torch.float64)
    got, want = rms_norm(x, gain_D, 1e-3), rms_norm_reference(x, gain_D, 1e-3)
    close(got, want, 1e-13)
    got_grads = torch.autograd.grad((got * weight).sum(), (x, gain_D))
    for g, w in zip(got_grads, torch.autograd.grad((want * weight).sum(), (x, gain_D)), strict=True):
        close(g, w, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_evaluation_equals_training(dtype):
    """The path without gradients computes the same norm."""
    x, gain_D = torch.randn(5, 7).to(dtype), torch.randn(7, dtype=torch.promote_types(dtype, torch.float32))
    with torch.no_grad():
        got = rms_norm(x, gain_D, 1e-3)
    assert got.dtype == gain_D.dtype
    close(got, rms_norm(x, gain_D.requires_grad_(), 1e-3).detach(), 1e-6 if dtype != torch.float64 else 1e-14)


def test_gradient_equals_finite_differences():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    gain_D = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, g: rms_norm(x, g, 1e-2), (x, gain_D))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computes_in_fp32_whatever_comes_in(dtype):
    x, gain_D = (30 * torch.randn(8, 64)).to(dtype), torch.randn(64)
    got = rms_norm(x, gain_D, 1e-6)
    assert got.dtype == torch.float32
    close(got.double(), rms_norm_reference(x.double(), gain_D.double(), 1e-6), 2e-6)


def test_row_of_zeros_stays_finite():
    """Its gradient is 1/sqrt(eps): large, not NaN."""
    x = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    y = rms_norm(x, torch.ones(4, dtype=torch.float64), 1e-6)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert (y == 0).all()
    close(grad, torch.full_like(grad, 1e3), 1e-9)
