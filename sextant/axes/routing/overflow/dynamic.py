"""Dynamic capacity: as many places as the fullest expert needs, or at most so many (Tutel, 2206.03382)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from sextant.axes.routing.base import Overflow, Routing, Stack, Usage
from sextant.axes.routing.overflow.admission import Order, admitted, ranked
from sextant.axes.routing.overflow.expected import longest_padding
from sextant.axes.routing.overflow.shares import through
from sextant.core.stream import Stream


class Dynamic(Overflow):
    """All shares are filled up with zeros to the largest, ``C``: nothing is dropped, the price is padding.

    With ``factor`` C is at most ``A * floor(factor * ceil(N / E))`` and what exceeds it is dropped, in evaluation too
    (Tutel's negative capacity factor).
    """

    kind: Literal["dynamic"] = "dynamic"
    factor: float | None = Field(default=None, gt=0)
    order: Order = "choice"

    def admit(self, routing: Routing, stream: Stream, training: bool) -> Routing:
        if self.factor is None:
            return routing
        (tokens, copies), experts = routing.experts_TA.shape, routing.probs_TE.shape[1]
        return admitted(routing, routing.experts_TA, self._most(tokens, copies, experts), ranked(routing, self.order))

    def compute(self, experts: Stack, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Usage]:
        return through(experts, x_TD, routing, tile=1, least=int(routing.taken_E().max()))

    def padding(self, tokens: int, chosen: int, experts: int) -> float:
        return longest_padding(tokens, chosen, experts, self._most(tokens, chosen, experts))

    def _most(self, tokens: int, chosen: int, experts: int) -> int:
        """Places of each expert at most."""
        return tokens if self.factor is None else chosen * int(self.factor * -(-tokens // experts))
