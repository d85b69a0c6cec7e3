"""Dropless: every expert takes all that is sent to it (MegaBlocks, 2211.15841; MAI-Base-1, section 8).

The default, because dropping changes what an ablation measures and lets later tokens decide about earlier ones.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sextant.axes.routing.base import Overflow, Routing, Stack, Usage
from sextant.kernels.grouped import row_tile
from sextant.kernels.permute import combine, dispatch, plan


class Dropless(Overflow):
    """No limit per expert; imbalance costs time, not tokens."""

    kind: Literal["dropless"] = "dropless"

    def compute(self, experts: Stack, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Usage]:
        """All copies, sorted by expert; the few of a decoding step without sorting."""
        y_TAD, gates_TA = experts.few(x_TD, routing.experts_TA), routing.gates_TA
        if y_TAD is not None:
            y_TD = torch.linalg.vecdot(y_TAD.to(gates_TA.dtype), gates_TA[..., None], dim=1)
            return y_TD, Usage(gates_TA.numel(), gates_TA.numel())
        where = plan(routing.experts_TA, experts.experts, row_tile(x_TD, routing.experts_TA.numel()))
        rows_ND = dispatch(x_TD, where, gates_TA.shape[1])
        y_TD = combine(experts(rows_ND, where.counts_E), gates_TA, where)
        return y_TD, Usage(len(rows_ND), len(rows_ND))
