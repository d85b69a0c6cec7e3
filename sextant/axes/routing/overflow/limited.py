"""What rules with a fixed number of places share: one factor in training, another or no limit in evaluation."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from sextant.axes.routing.base import Overflow, Routing, Stack, Usage
from sextant.axes.routing.overflow.shares import through
from sextant.core.stream import Stream


class Limited(Overflow):
    """Places per expert are ``factor`` times an even share, at least ``minimum``.

    What finds no place is dropped: its token passes by the residual. So the function that is trained is not the one the
    router chose, and neighbours decide about each other, in some orders even later tokens about earlier ones
    (MAI-Base-1, section 8.1). With ``eval_factor`` None nothing is dropped in evaluation.
    """

    factor: float = Field(default=1.25, gt=0)
    eval_factor: float | None = Field(default=None, gt=0)
    minimum: int = Field(default=1, ge=1)

    def admit(self, routing: Routing, stream: Stream, training: bool) -> Routing:
        factor = self.factor if training else self.eval_factor
        return routing if factor is None else self.limit(routing, stream, factor)

    def limit(self, routing: Routing, stream: Stream, factor: float) -> Routing:
        """The routing with ``kept_TA`` for this factor."""
        raise NotImplementedError

    def compute(self, experts: Stack, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Usage]:
        return through(experts, x_TD, routing)
