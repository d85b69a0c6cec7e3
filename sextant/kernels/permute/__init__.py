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

    Rows lie sorted by expert, in token order inside an expert. Each expert's share may be filled up with rows of zeros,
    which products leave zero: a few row counts instead of a new one each step. A dropped copy has no row.

    Attributes:
        source_N: the copy (``t * A + a``) that each row holds; any copy for a row of zeros.
        row_N: the row at which each copy lies; any row for a dropped copy.
        counts_E: int64, rows per expert, rows of zeros included.
        zeros: numbers of the rows of zeros; None where shares are not filled up.
        kept_N: bool, copies that have a row; None when all do.
    """

    source_N: Tensor
    row_N: Tensor
    counts_E: Tensor
    zeros: Tensor | None = None
    kept_N: Tensor | None = None

    @property
    def padding(self) -> int:
        """Rows of zeros."""
        return 0 if self.zeros is None else len(self.zeros)


def counted(flat_N: Tensor, experts: int) -> Tensor:
    """int64 copies per expert; unlike ``bincount`` its shape does not depend on values, so compilers can follow."""
    counts_E = torch.zeros(experts, dtype=torch.int64, device=flat_N.device)
    return counts_E.scatter_add_(0, flat_N, torch.ones_like(flat_N))


def plan(experts_TA: Tensor, experts: int, tile: int = 1, kept_TA: Tensor | None = None, least: int = 0) -> Plan:
    """Sort token copies by expert, stably.

    Args:
        experts_TA: int64, chosen experts.
        experts: how many there are.
        tile: every expert's share is filled up to a multiple of it.
        kept_TA: bool, copies that get a row; None for all.
        least: rows that every expert's share has at least, if there is a token at all.
    """
    flat_N = experts_TA.flatten()
    order_N = torch.argsort(flat_N, stable=True)
    kept_N = None if kept_TA is None else kept_TA.flatten()
    if kept_N is not None:
        order_N = order_N[kept_N[order_N]]
    sorted_N = flat_N[order_N]
    counts_E, row_N = counted(sorted_N, experts), torch.zeros_like(flat_N)
    rank_N = torch.arange(order_N.numel(), device=order_N.device)
    if not flat_N.numel() or (tile == 1 and not least):
        row_N[order_N] = rank_N
        return Plan(order_N, row_N, counts_E, None, kept_N)
    filled_E = (counts_E.clamp_min(least) + tile - 1).div(tile, rounding_mode="floor") * tile
    shift_E = (filled_E - counts_E).cumsum(0) - (filled_E - counts_E)
    rank_N += shift_E[sorted_N]
    row_N[order_N] = rank_N
    source_N = torch.full((int(filled_E.sum()),), -1, dtype=order_N.dtype, device=order_N.device)
    source_N[rank_N] = order_N
    return Plan(source_N.clamp_min(0), row_N, filled_E, (source_N < 0).nonzero()[:, 0], kept_N)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, copies: int, *parts: Tensor | None) -> Tensor:
        source_N, row_N, zeros, kept_N = parts
        ctx.copies = copies
        ctx.save_for_backward(row_N, kept_N)
        return rows(x_TD, source_N, zeros, copies)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        row_N, kept_N = ctx.saved_tensors
        return summed(grads[0], row_N.view(-1, ctx.copies), kept_N), *[None] * 5


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, gates_TA: Tensor, *parts: Tensor | None) -> Tensor:
        ctx.save_for_backward(y_ND, gates_TA, *parts)
        return weighted(y_ND, gates_TA, parts[1], parts[3])  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y_ND, gates_TA, source_N, row_N, zeros, kept_N = ctx.saved_tensors
        dy_ND = rows(grads[0], source_N, zeros, gates_TA.shape[1])
        dgates_N = taken(torch.linalg.vecdot(y_ND.to(dy_ND.dtype), dy_ND), row_N, kept_N)
        dy_ND *= gates_TA.flatten().index_select(0, source_N)[:, None]
        return dy_ND.to(y_ND.dtype), dgates_N.view_as(gates_TA), *[None] * 4


def rows(x_TD: Tensor, source_N: Tensor, zeros: Tensor | None, copies: int) -> Tensor:
    """The token of each row's copy; zeros in the rows of zeros."""
    rows_ND = x_TD.index_select(0, source_N // copies)
    return rows_ND if zeros is None else rows_ND.index_fill_(0, zeros, 0)


def taken(of_rows: Tensor, row_N: Tensor, kept_N: Tensor | None) -> Tensor:
    """Rows back in the order of copies; zeros for a dropped one, whatever lies in the row that it points to."""
    of_copies = of_rows.index_select(0, row_N)
    if kept_N is None:
        return of_copies
    return of_copies.masked_fill(~kept_N.view(-1, *[1] * (of_copies.dim() - 1)), 0)


def weighted(y_ND: Tensor, gates_TA: Tensor, row_N: Tensor, kept_N: Tensor | None) -> Tensor:
    """``sum_a gates_ta * y_(t,a)`` in the gates' dtype, without a gradient on a CPU."""
    if not torch.compiler.is_compiling() and (y_ND.device.type == "cpu" or not len(y_ND)):
        return summed(y_ND.to(gates_TA.dtype), row_N.view_as(gates_TA), kept_N, gates_TA)
    y_TAD = taken(y_ND, row_N, kept_N).unflatten(0, gates_TA.shape)
    return torch.linalg.vecdot(y_TAD.to(gates_TA.dtype), gates_TA[..., None], dim=1)


def summed(y_ND: Tensor, row_TA: Tensor, kept_N: Tensor | None = None, gates_TA: Tensor | None = None) -> Tensor:
    """The rows of each token added up in the order of A, weighted by its gates: one pass, without a copy of the rows.

    What is not kept is not read, so that it cannot spoil a sum.
    """
    if not len(y_ND):
        return y_ND.new_zeros(len(row_TA), y_ND.shape[1])
    if kept_N is None:
        return F.embedding_bag(row_TA, y_ND, mode="sum", per_sample_weights=gates_TA)
    kept_TA = kept_N.view_as(row_TA)
    count_T = kept_TA.sum(1)
    gates_N = None if gates_TA is None else gates_TA[kept_TA]
    return F.embedding_bag(row_TA[kept_TA], y_ND, count_T.cumsum(0) - count_T, mode="sum", per_sample_weights=gates_N)


def dispatch(x_TD: Tensor, where: Plan, copies: int) -> Tensor:
    """Rows of the experts, ``[N, D]``: every token once for each of the ``copies`` = A experts that take it."""
    if where.kept_N is not None and not len(where.source_N):
        return x_TD[:0]
    if torch.compiler.is_compiling():  # plain operations, and still no index twice: its backward needs no atomics
        return rows(x_TD.repeat_interleave(copies, dim=0), where.source_N, where.zeros, 1)
    if not torch.is_grad_enabled():
        return rows(x_TD, where.source_N, where.zeros, copies)
    parts = (where.source_N, where.row_N, where.zeros, where.kept_N)
    return _Dispatch.apply(x_TD, copies, *parts)  # type: ignore[return-value]


def combine(y_ND: Tensor, gates_TA: Tensor, where: Plan) -> Tensor:
    """``out_t = sum_a gates_ta * y_(t,a)`` over the kept copies, in the gates' dtype (fp32), in the order of the gates.

    A dropped copy adds nothing, and its gate's gradient is 0.
    """
    if where.kept_N is not None and not len(where.source_N):
        return gates_TA.sum(1, keepdim=True) * y_ND.to(gates_TA.dtype).sum(0)  # the sum of no rows
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return weighted(y_ND, gates_TA, where.row_N, where.kept_N)
    parts = (where.source_N, where.row_N, where.zeros, where.kept_N)
    return _Combine.apply(y_ND, gates_TA, *parts)  # type: ignore[return-value]
