"""LayerScale: a pre-norm whose branch is multiplied by one small number per channel (2103.17239)."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from sextant.axes.stability.residual.base import Branch, Normed, Sublayer
from sextant.core.cost import At, Cost


class LayerScale(Normed):
    """``x + diag(s) f(norm(x))``; every channel of ``s`` begins at ``start``."""

    kind: Literal["layerscale"] = "layerscale"
    start: float = Field(default=0.1, gt=0)

    @classmethod
    def at_depth(cls, layers: int, **fields: Any) -> Self:
        """With the paper's start: 0.1 up to 18 layers, 1e-5 up to 24, 1e-6 beyond."""
        return cls(start=0.1 if layers <= 18 else 1e-5 if layers <= 24 else 1e-6, **fields)

    def build(self, width: int) -> nn.ModuleList:
        return nn.ModuleList(ScaledBranch(self, width) for _ in range(2))

    def cost(self, width: int, at: At) -> Cost:
        return super().cost(width, at) + 2 * Cost(width, width, activation_bytes=at.itemsize * width)


class ScaledBranch(Branch):
    def __init__(self, spec: LayerScale, width: int):
        super().__init__(scale_D=spec.start)
        self.dropout = spec.dropout
        self.norm = spec.norm.build(width)
        self.scale_D = nn.Parameter(torch.empty(width))

    def forward(self, x_TD: Tensor, f: Sublayer) -> tuple[Tensor, Any]:
        y_TD, record = f(self.norm(x_TD))
        return x_TD + self.scale_D * self.dropped(y_TD), record
