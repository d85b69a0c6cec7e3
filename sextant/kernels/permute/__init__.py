"""Token copies to their experts and back, in a fixed order: no atomics, so results repeat bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """Where each of N = T·A token copies goes.

    Attributes:
        order_N: copy numbers (``t * A + a``) sorted by expert, in token order inside an expert.
        inverse_N: the row at which each copy lies.
        counts_E: int64, copies per expert; they sum to N.
    """

    order_N: Tensor
    inverse_N: Tensor
    counts_E: Tensor


def plan(experts_TA: Tensor, experts: int) -> Plan:
    """Sort token copies by expert, stably."""
    flat_N = experts_TA.flatten()
    order_N = torch.argsort(flat_N, stable=True)
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    return Plan(order_N, inverse_N, torch.bincount(flat_N, minlength=experts))


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, inverse_N: Tensor, copies: int) -> Tensor:
        ctx.copies = copies
        ctx.save_for_backward(inverse_N)
        return x_TD.index_select(0, order_N // copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_N,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse_N).unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, gates_TA: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(y_ND, gates_TA, order_N, inverse_N)
        y_TAD = y_ND.index_select(0, inverse_N).unflatten(0, gates_TA.shape)
        return torch.einsum("tad,ta->td", y_TAD.to(gates_TA.dtype), gates_TA)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_ND, gates_TA, order_N, inverse_N = ctx.saved_tensors
        rows_ND = grads[0].index_select(0, order_N // gates_TA.shape[1])
        dgates_N = torch.linalg.vecdot(rows_ND, y_ND.to(rows_ND.dtype))
        dy_ND = rows_ND * gates_TA.flatten().index_select(0, order_N)[:, None]
        return dy_ND.to(y_ND.dtype), dgates_N.index_select(0, inverse_N).view_as(gates_TA), None, None


def dispatch(x_TD: Tensor, plan: Plan, copies: int) -> Tensor:
    """Rows of the experts, ``[N, D]``: every token once for each expert it goes to."""
    return _Dispatch.apply(x_TD, plan.order_N, plan.inverse_N, copies)  # type: ignore[return-value]


def combine(y_ND: Tensor, gates_TA: Tensor, plan: Plan) -> Tensor:
    """``out_t = sum_a gates_ta * y_(t,a)`` in the gates' dtype (fp32), in the order of the gates."""
    return _Combine.apply(y_ND, gates_TA, plan.order_N, plan.inverse_N)  # type: ignore[return-value]
