"""Token copies to their experts and back, in a fixed order: no atomics, so results repeat bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """Where each of N = T·A token copies goes among the experts' rows.

    Rows lie sorted by expert, in token order inside an expert. With a ``tile`` above 1 each expert's share is filled up
    to a multiple of it with rows of zeros, which products leave zero: a few row counts instead of a new one each step.

    Attributes:
        source_N: the copy (``t * A + a``) that each row holds; any copy for a row of zeros.
        row_N: the row at which each copy lies.
        counts_E: int64, rows per expert, rows of zeros included.
        zeros: numbers of the rows of zeros; None without a tile.
    """

    source_N: Tensor
    row_N: Tensor
    counts_E: Tensor
    zeros: Tensor | None = None


def counted(flat_N: Tensor, experts: int) -> Tensor:
    """int64 copies per expert; unlike ``bincount`` its shape does not depend on values, so compilers can follow."""
    counts_E = torch.zeros(experts, dtype=torch.int64, device=flat_N.device)
    return counts_E.scatter_add_(0, flat_N, torch.ones_like(flat_N))


def plan(experts_TA: Tensor, experts: int, tile: int = 1) -> Plan:
    """Sort token copies by expert, stably."""
    flat_N = experts_TA.flatten()
    order_N = torch.argsort(flat_N, stable=True)
    counts_E = counted(flat_N, experts)
    rank_N = torch.arange(order_N.numel(), device=order_N.device)
    row_N = torch.empty_like(order_N)
    if tile == 1:
        row_N[order_N] = rank_N
        return Plan(order_N, row_N, counts_E)
    tiled_E = (counts_E + tile - 1).div(tile, rounding_mode="floor") * tile
    shift_E = (tiled_E - counts_E).cumsum(0) - (tiled_E - counts_E)
    row_N[order_N] = rank_N + shift_E[flat_N[order_N]]
    source_N = torch.full((int(tiled_E.sum()),), -1, dtype=order_N.dtype, device=order_N.device)
    source_N[row_N] = rank_N
    return Plan(source_N.clamp_min(0), row_N, tiled_E, (source_N < 0).nonzero()[:, 0])


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, source_N: Tensor, row_N: Tensor, zeros: Tensor | None, copies: int) -> Tensor:
        ctx.copies = copies
        ctx.save_for_backward(row_N)
        return _rows(x_TD, source_N, zeros, copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (row_N,) = ctx.saved_tensors
        return _summed(grads[0], row_N.view(-1, ctx.copies)), None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_ND: Tensor, gates_TA: Tensor, source_N: Tensor, row_N: Tensor, zeros: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(y_ND, gates_TA, source_N, row_N, zeros)
        return _weighted(y_ND, gates_TA, row_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        y_ND, gates_TA, source_N, row_N, zeros = ctx.saved_tensors
        dy_ND = _rows(grads[0], source_N, zeros, gates_TA.shape[1])
        dgates_N = torch.linalg.vecdot(y_ND.to(dy_ND.dtype), dy_ND)
        dy_ND *= gates_TA.flatten().index_select(0, source_N)[:, None]
        return dy_ND.to(y_ND.dtype), dgates_N.index_select(0, row_N).view_as(gates_TA), None, None, None


def _rows(x_TD: Tensor, source_N: Tensor, zeros: Tensor | None, copies: int) -> Tensor:
    rows_ND = x_TD.index_select(0, source_N // copies)
    return rows_ND if zeros is None else rows_ND.index_fill_(0, zeros, 0)


def _weighted(y_ND: Tensor, gates_TA: Tensor, row_N: Tensor) -> Tensor:
    if y_ND.device.type == "cpu" and not torch.compiler.is_compiling():
        return _summed(y_ND.to(gates_TA.dtype), row_N.view_as(gates_TA), gates_TA)
    y_TAD = y_ND.index_select(0, row_N).unflatten(0, gates_TA.shape)
    return torch.linalg.vecdot(y_TAD.to(gates_TA.dtype), gates_TA[..., None], dim=1)


def _summed(y_ND: Tensor, row_TA: Tensor, gates_TA: Tensor | None = None) -> Tensor:
    """The rows of each token added up, weighted by its gates: one pass, without a copy of the rows."""
    return F.embedding_bag(row_TA, y_ND, mode="sum", per_sample_weights=gates_TA)


def dispatch(x_TD: Tensor, where: Plan, copies: int) -> Tensor:
    """Rows of the experts, ``[N, D]``: every token once for each of the ``copies`` = A experts it goes to."""
    if torch.compiler.is_compiling():  # plain operations, and still no index twice: its backward needs no atomics
        return _rows(x_TD.repeat_interleave(copies, dim=0), where.source_N, where.zeros, 1)
    if not torch.is_grad_enabled():
        return _rows(x_TD, where.source_N, where.zeros, copies)
    return _Dispatch.apply(x_TD, where.source_N, where.row_N, where.zeros, copies)  # type: ignore[return-value]


def combine(y_ND: Tensor, gates_TA: Tensor, where: Plan) -> Tensor:
    """``out_t = sum_a gates_ta * y_(t,a)`` in the gates' dtype (fp32), in the order of the gates."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _weighted(y_ND, gates_TA, where.row_N)
    parts = (where.source_N, where.row_N, where.zeros)
    return _Combine.apply(y_ND, gates_TA, *parts)  # type: ignore[return-value]
