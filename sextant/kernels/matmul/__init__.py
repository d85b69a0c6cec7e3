"""Products of half-precision matrices on any CPU.

A CPU without instructions for them (AVX2 only, for one) multiplies half precision 10 to 60 times slower than fp32, and
some layouts slower still. There the factors are widened, which is exact, and the sum is rounded once: what hardware
with fp32 sums gives. Everywhere else these are torch's products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _slow() -> frozenset[torch.dtype]:
    """Asked as torch's own compiler asks."""
    if not torch.backends.mkldnn.is_available():
        return frozenset({torch.bfloat16, torch.float16})
    names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return frozenset(dtype for dtype, name in names.items() if not getattr(torch.ops.mkldnn, name)())


SLOW = _slow()
"""Dtypes whose products this CPU has no fast way for."""


def is_slow(x: Tensor) -> bool:
    """Is a product of this dtype far slower than fp32 where ``x`` lies?"""
    return x.dtype in SLOW and x.device.type == "cpu"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T (+ b)`` for ``x`` [..., in], ``weight`` [out, in] and ``bias`` [out] of one dtype."""
    if not is_slow(x) or x.shape[:-1].numel() == 1:  # one row times a matrix is fast on any CPU
        return F.linear(x, weight, bias)
    return _widened(x.flatten(0, -2), weight.t(), bias).unflatten(0, x.shape[:-1])


def mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of two matrices or of two equally long batches of them."""
    return _widened(a, b) if is_slow(a) else a @ b


def mm_into(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``a @ b`` of matrices, written to ``out`` and returned; keeps no gradient."""
    if not is_slow(a):
        return torch.mm(a, b, out=out)
    if len(a) != 1:
        return out.copy_(torch.ops.sextant.widened_mm(a, b))
    torch.mv(b.t(), a[0], out=out[0])
    return out


def _widened(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    product = _Widened.apply if torch.is_grad_enabled() else torch.ops.sextant.widened_mm
    return product(a, b, bias)  # type: ignore[return-value]


def _widened_mm(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    y = a.float() @ b.float()
    return (y if bias is None else y.add_(bias)).to(a.dtype)


_LIBRARY = torch.library.Library("sextant", "FRAGMENT")  # as an operation, so that an audit sees the factors themselves
_LIBRARY.define("widened_mm(Tensor a, Tensor b, Tensor? bias=None) -> Tensor")
_LIBRARY.impl("widened_mm", _widened_mm, "CompositeExplicitAutograd")


class _Widened(torch.autograd.Function):
    """Keeps the factors themselves: half the memory of their wide copies."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.ops.sextant.widened_mm(a, b, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (a, b), dy = ctx.saved_tensors, grads[0]
        wants_a, wants_b, wants_bias = ctx.needs_input_grad
        da = torch.ops.sextant.widened_mm(dy, b.mT) if wants_a else None
        db = torch.ops.sextant.widened_mm(a.mT, dy) if wants_b else None
        return da, db, dy.sum(0) if wants_bias else None
