"""A norm after each residual sum, as the first transformer had it."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from sextant.axes.stability.residual.base import Branch, Normed, Sublayer


class PostNorm(Normed):
    """``norm(x + f(x))`` (1706.03762)."""

    kind: Literal["post"] = "post"

    def build(self, width: int) -> nn.ModuleList:
        return nn.ModuleList(PostBranch(self, width) for _ in range(2))


class PostBranch(Branch):
    def __init__(self, spec: PostNorm, width: int):
        super().__init__()
        self.dropout = spec.dropout
        self.norm = spec.norm.build(width)

    def forward(self, x_TD: Tensor, f: Sublayer) -> tuple[Tensor, Any]:
        y_TD, record = f(x_TD)
        return self.norm(x_TD + self.dropped(y_TD)), record
