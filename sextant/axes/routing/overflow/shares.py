"""Dispatch, experts, combine on one device: rows sorted by expert, each expert's share filled up or not."""

from __future__ import annotations

import torch
from torch import Tensor

from sextant.axes.routing.base import Routing, Stack, Usage
from sextant.kernels.grouped import row_tile
from sextant.kernels.permute import combine, dispatch, plan


def through(
    experts: Stack, x_TD: Tensor, routing: Routing, tile: int | None = None, least: int = 0
) -> tuple[Tensor, Usage]:
    """All kept copies, sorted by expert; the few of a decoding step without sorting.

    Args:
        experts: the experts.
        x_TD: rows in the compute dtype.
        routing: who goes where, and what is dropped.
        tile: each expert's share is filled up to a multiple of it; None for what the device likes.
        least: rows that each share has at least.
    """
    few = _few(experts, x_TD, routing)
    if few is not None:
        return few
    tile = row_tile(x_TD, routing.experts_TA.numel()) if tile is None else tile
    where = plan(routing.experts_TA, experts.experts, tile, routing.kept_TA, least)
    rows_ND = experts(dispatch(x_TD, where, routing.gates_TA.shape[1]), where.counts_E)
    return combine(rows_ND, routing.gates_TA, where), Usage(len(rows_ND), len(rows_ND), padding=where.padding)


def _few(experts: Stack, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Usage] | None:
    y_TAD, gates_TA = experts.few(x_TD, routing.experts_TA), routing.gates_TA
    if y_TAD is None:
        return None
    if routing.kept_TA is not None:
        y_TAD = y_TAD.masked_fill(~routing.kept_TA[..., None], 0)
    y_TD = torch.linalg.vecdot(y_TAD.to(gates_TA.dtype), gates_TA[..., None], dim=1)
    return y_TD, Usage(gates_TA.numel(), gates_TA.numel())
