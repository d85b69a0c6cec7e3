"""A norm before each sublayer: the stream itself is never normed (GPT-2, Llama)."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from sextant.axes.stability.residual.base import Branch, Normed, Sublayer


class PreNorm(Normed):
    """``x + f(norm(x))`` (GPT-2, Llama)."""

    kind: Literal["pre"] = "pre"

    def build(self, width: int) -> nn.ModuleList:
        return nn.ModuleList(PreBranch(self, width) for _ in range(2))


class PreBranch(Branch):
    def __init__(self, spec: PreNorm, width: int):
        super().__init__()
        self.dropout = spec.dropout
        self.norm = spec.norm.build(width)

    def forward(self, x_TD: Tensor, f: Sublayer) -> tuple[Tensor, Any]:
        y_TD, record = f(self.norm(x_TD))
        return x_TD + self.dropped(y_TD), record
