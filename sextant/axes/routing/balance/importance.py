"""Importance loss (Shazeer 2017, 1701.06538, equation 7): experts should get equal sums of gates."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sextant.axes.routing.balance.spread import SpreadLoss
from sextant.axes.routing.base import Routing


class Importance(SpreadLoss):
    """``coef * CV^2`` of each expert's gates, summed over tokens; gates of experts not chosen are 0."""

    kind: Literal["importance"] = "importance"

    def sum_E(self, routing: Routing) -> Tensor:
        gates_N, experts_N = routing.gates_TA.flatten(), routing.experts_TA.flatten()
        return gates_N.new_zeros(routing.probs_TE.shape[1]).index_add(0, experts_N, gates_N)
