"""The losses of Shazeer 2017 (1701.06538, section 4): how widely a sum over tokens spreads among the experts.

``coef * CV(x_E)^2``: variance over squared mean, 0 when even, E - 1 when one expert has all.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from sextant.axes.routing.balance.base import BalanceLoss
from sextant.axes.routing.base import Routing
from sextant.core.stream import Stream


class SpreadLoss(BalanceLoss):
    """Base of the two. Each micro-batch counts by its tokens, or the whole step is summed first (``global_batch``)."""

    coef: float = Field(default=0.1, ge=0)
    scope: Literal["micro_batch", "global_batch"] = "micro_batch"

    @property
    def ahead(self) -> bool:
        return self.scope == "global_batch"

    def sum_E(self, routing: Routing) -> Tensor:
        """What is to be even, with gradient."""
        raise NotImplementedError

    def tally(self, routing: Routing) -> Tensor | None:
        return self.sum_E(routing).detach() if self.ahead else None

    def loss(self, routing: Routing, stream: Stream, counts_E: Tensor | None, tokens: int) -> Tensor:
        sum_E, weight = self.sum_E(routing), len(routing.experts_TA) / tokens
        if counts_E is None:
            return self.coef * weight * squared_variation(sum_E)
        whole = squared_variation(sum_E + (counts_E - sum_E).detach())  # the others' part is a constant here
        return self.coef * (whole - (1 - weight) * whole.detach())


def squared_variation(x_E: Tensor) -> Tensor:
    """``CV^2``; 0 for a sum of nothing."""
    return x_E.var(correction=0) / x_E.mean().square().clamp_min(1e-10)
