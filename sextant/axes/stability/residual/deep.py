"""DeepNorm: norms on the residual path, which a factor above 1 favours (2203.00555; spec minimax-01, section 5.1)."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field
from torch import Tensor, nn

from sextant.axes.stability.residual.base import Branch, Normed, Sublayer


class DeepNorm(Normed):
    """``alpha u + beta f(u)`` with ``u = norm(x)``: a post-norm whose norm stands at the next sublayer's entry, so that
    the model's own norms are the first and the last (MiniMax-01; spec minimax-01, section 5.1).

    Attributes:
        alpha: factor on the normed row; :meth:`at_depth` gives the paper's.
        beta: factor on the branch; the paper's ``(8 L) ** -0.25`` is a gain at the start, not this
            (:class:`~sextant.axes.stability.init.DeepNormInit`).
    """

    kind: Literal["deep"] = "deep"
    alpha: float = Field(default=1.0, gt=0)
    beta: float = Field(default=1.0, gt=0)

    @classmethod
    def at_depth(cls, layers: int, **fields: Any) -> Self:
        """With ``alpha = (2 L) ** 0.25``, as for a decoder of L layers."""
        return cls(alpha=(2 * layers) ** 0.25, **fields)

    def build(self, width: int) -> nn.ModuleList:
        return nn.ModuleList(DeepBranch(self, width) for _ in range(2))


class DeepBranch(Branch):
    def __init__(self, spec: DeepNorm, width: int):
        super().__init__()
        self.dropout, self.alpha, self.beta = spec.dropout, spec.alpha, spec.beta
        self.norm = spec.norm.build(width)

    def forward(self, x_TD: Tensor, f: Sublayer) -> tuple[Tensor, Any]:
        u_TD = self.norm(x_TD)
        y_TD, record = f(u_TD)
        return self.alpha * u_TD + self.beta * self.dropped(y_TD), record
