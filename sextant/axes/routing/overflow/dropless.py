"""Dropless: every expert takes all that is sent to it (MegaBlocks, 2211.15841; MAI-Base-1, section 8).

The default, because dropping changes what an ablation measures and lets later tokens decide about earlier ones.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from sextant.axes.routing.base import Overflow, Routing, Stack, Usage
from sextant.axes.routing.overflow.expected import block_padding
from sextant.axes.routing.overflow.rounds import fixed_tiles
from sextant.axes.routing.overflow.shares import through


class Dropless(Overflow):
    """No limit per expert; imbalance costs time, not tokens.

    With ``tile`` every product has exactly so many rows, so that results do not depend on how rows are divided: the
    bits of :class:`~sextant.axes.routing.overflow.rounds.CappedRounds`, at the price of many small products.
    """

    kind: Literal["dropless"] = "dropless"
    tile: int | None = Field(default=None, ge=1)

    def compute(self, experts: Stack, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Usage]:
        if self.tile is None:
            return through(experts, x_TD, routing)
        return fixed_tiles(experts, x_TD, routing, self.tile)

    @property
    def keeps_rows(self) -> bool:
        return self.tile is None

    def padding(self, tokens: int, chosen: int, experts: int) -> float:
        return block_padding(tokens, chosen, experts, self.tile) if self.tile else 0.0
