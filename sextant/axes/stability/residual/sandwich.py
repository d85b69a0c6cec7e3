"""Norms on both sides of each sublayer, and attention that may start switched off (spec mai-base-1, section 3)."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from sextant.axes.stability.residual.base import Branch, Normed, Sublayer


class SandwichNorm(Normed):
    """``x + norm_out(f(norm_in(x)))`` (MAI-Base-1, Gemma 3).

    ``attention_gain`` is what the gain of the attention's output norm starts at. 0 turns attention off at step 0, so
    that routers see distinct tokens: the gain is zeroed, never the projection, because a norm of an exact zero has a
    gradient of ``1/sqrt(eps)``.
    """

    kind: Literal["sandwich"] = "sandwich"
    attention_gain: float = 1.0

    @property
    def norms(self) -> int:
        return 2

    def build(self, width: int) -> nn.ModuleList:
        return nn.ModuleList(SandwichBranch(self, width, gain) for gain in (self.attention_gain, 1.0))


class SandwichBranch(Branch):
    def __init__(self, spec: SandwichNorm, width: int, gain: float):
        super().__init__(norm_out=gain)
        self.dropout = spec.dropout
        self.norm = spec.norm.build(width)
        self.norm_out = spec.norm.build(width)

    def forward(self, x_TD: Tensor, f: Sublayer) -> tuple[Tensor, Any]:
        y_TD, record = f(self.norm(x_TD))
        return x_TD + self.dropped(self.norm_out(y_TD)), record
