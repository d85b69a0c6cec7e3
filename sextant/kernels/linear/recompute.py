"""A recurrence that keeps its inputs alone for the backward, and runs once more there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def recomputed(function: Callable[..., tuple[Tensor, ...]], *rows: Tensor | None) -> tuple[Tensor, ...]:
    """``function(*rows)``; what it computes on the way is not kept. It must not draw random numbers, and all that it
    differentiates must be in ``rows``.
    """
    empty = any(x is not None and not x.numel() for x in rows)
    if empty or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*rows)
    return _Recomputed.apply(function, *rows)  # type: ignore[return-value]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, ...]], *rows: Any) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(*rows)
        return function(*rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        rows: list[Any] = [x if x is None else x.detach() for x in ctx.saved_tensors]
        leaves = [x.requires_grad_() for x, want in zip(rows, wanted, strict=True) if want]
        with torch.enable_grad():
            outputs = ctx.function(*rows)
        found = iter(torch.autograd.grad(outputs, leaves, grads))
        return None, *(next(found) if want else None for want in wanted)
