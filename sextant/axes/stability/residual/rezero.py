"""ReZero: no norm, and one scalar per layer that both sublayers are multiplied by (2003.04887)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from sextant.axes.stability.residual.base import Branch, Placement, Sublayer
from sextant.core.cost import At, Cost


class ReZero(Placement):
    """``x + a f(x)`` with ``a = 0`` at the start: every layer begins as the identity."""

    kind: Literal["rezero"] = "rezero"

    def build(self, width: int) -> nn.ModuleList:
        attention = ReZeroBranch(self)
        return nn.ModuleList([attention, FollowingBranch(self, attention)])

    def cost(self, width: int, at: At) -> Cost:
        return Cost(1, 1, activation_bytes=2 * at.itemsize * width)


class ReZeroBranch(Branch):
    """Holds the layer's scalar."""

    def __init__(self, spec: ReZero):
        super().__init__(scale=0.0)
        self.dropout = spec.dropout
        self.scale = nn.Parameter(torch.empty(1))

    def forward(self, x_TD: Tensor, f: Sublayer) -> tuple[Tensor, Any]:
        y_TD, record = f(x_TD)
        return x_TD + self.scale * self.dropped(y_TD), record


class FollowingBranch(Branch):
    """Multiplies by the scalar of another branch, which it does not own: a checkpoint has it once."""

    def __init__(self, spec: ReZero, leader: ReZeroBranch):
        super().__init__()
        self.dropout = spec.dropout
        self.leaders = (leader,)  # a tuple, so that the leader is no submodule of this one

    def forward(self, x_TD: Tensor, f: Sublayer) -> tuple[Tensor, Any]:
        y_TD, record = f(x_TD)
        return x_TD + self.leaders[0].scale * self.dropped(y_TD), record
