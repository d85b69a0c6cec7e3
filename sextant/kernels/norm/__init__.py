"""Root-mean-square norm in fp32 whatever comes in, with a backward that keeps only the input and one scale per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """``gain * x / sqrt(mean(x^2) + eps)`` over the last axis, by autograd: the truth for :func:`rms_norm`."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return gain_D * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.rsqrt(norm * norm / x.shape[-1] + eps)
        ctx.save_for_backward(x, gain_D, scale)
        return (x * scale).mul_(gain_D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain_D, scale = ctx.saved_tensors
        unit = x * scale
        dgain_D = (grads[0] * unit).flatten(0, -2).sum(0)
        dunit = grads[0] * gain_D
        along = torch.linalg.vecdot(dunit, unit).unsqueeze(-1) / x.shape[-1]
        return (dunit - unit.mul_(along)).mul_(scale), dgain_D, None


def rms_norm(x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """``gain * x / sqrt(mean(x^2) + eps)`` over the last axis; returns fp32 (fp64 for fp64)."""
    if torch.compiler.is_compiling():
        return rms_norm_reference(x, gain_D, eps)  # fused there, and compilers follow plain operations best
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    if not torch.is_grad_enabled():
        return torch.rms_norm(x, gain_D.shape, gain_D, eps)
    return _RMSNorm.apply(x, gain_D, eps)  # type: ignore[return-value]
