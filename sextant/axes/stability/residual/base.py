"""What stands around a layer's two sublayers: the contract, and the shape that most placements have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sextant.axes.stability.norm import AnyNorm, RMSNorm
from sextant.core.cost import At, Cost
from sextant.core.spec import Spec

Sublayer = Callable[[Tensor], tuple[Tensor, Any]]
"""What a branch wraps: rows ``[T, D]`` in, rows and an optional record out."""


class Branch(nn.Module):
    """The rows ``x_TD`` and a sublayer, to the rows after it and the sublayer's record.

    ``starts`` is what its own parameters, and the gains of its norms, start at; norms it does not name start at 1.
    """

    dropout = 0.0

    def __init__(self, **starts: float):
        super().__init__()
        self.starts = starts

    def forward(self, x_TD: Tensor, f: Sublayer) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def dropped(self, y_TD: Tensor) -> Tensor:
        """What a sublayer adds, after dropout; without any there is no call, which a decoding step would feel."""
        return F.dropout(y_TD, self.dropout) if self.training and self.dropout else y_TD

    @torch.no_grad()
    def start(self) -> None:
        """Set what ``starts`` names."""
        for name, value in self.starts.items():
            part = getattr(self, name)
            part.fill(value) if isinstance(part, nn.Module) else part.fill_(value)  # type: ignore[operator]


class Placement(Spec):
    """Base of the placements; ``dropout`` falls on what a sublayer adds."""

    dropout: float = Field(default=0.0, ge=0, lt=1)

    def build(self, width: int) -> nn.ModuleList:
        """The :class:`Branch` around attention and the one around the feed-forward."""
        raise NotImplementedError

    def cost(self, width: int, at: At) -> Cost:
        """Of both branches of a layer."""
        raise NotImplementedError


class Normed(Placement):
    """Base of the placements with norms."""

    norm: AnyNorm = RMSNorm()

    @property
    def norms(self) -> int:
        """Norms per sublayer."""
        return 1

    def cost(self, width: int, at: At) -> Cost:
        return 2 * self.norms * self.norm.cost(width, at)
