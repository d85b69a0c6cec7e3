"""SkipInit: no norm, and a scalar per branch that starts at 0 or small (2002.10444)."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from sextant.axes.stability.residual.base import Branch, Placement, Sublayer
from sextant.core.cost import At, Cost


class SkipInit(Placement):
    """``x + a f(x)``; ``a`` is learnt, one per branch, and begins at ``start``."""

    kind: Literal["skipinit"] = "skipinit"
    start: float = 0.0

    @classmethod
    def at_depth(cls, layers: int, **fields: Any) -> Self:
        """With ``start = 1 / sqrt(2 L)``, the paper's other choice: L layers have 2 L branches."""
        return cls(start=1 / math.sqrt(2 * layers), **fields)

    def build(self, width: int) -> nn.ModuleList:
        return nn.ModuleList(SkipBranch(self) for _ in range(2))

    def cost(self, width: int, at: At) -> Cost:
        return Cost(2, 2, activation_bytes=2 * at.itemsize * width)


class SkipBranch(Branch):
    def __init__(self, spec: SkipInit):
        super().__init__(scale=spec.start)
        self.dropout = spec.dropout
        self.scale = nn.Parameter(torch.empty(1))

    def forward(self, x_TD: Tensor, f: Sublayer) -> tuple[Tensor, Any]:
        y_TD, record = f(x_TD)
        return x_TD + self.scale * self.dropped(y_TD), record
