"""Whole blocks: every expert's share is filled up to a multiple of a kernel's block (MegaBlocks, 2211.15841)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from sextant.axes.routing.base import Overflow, Routing, Stack, Usage
from sextant.axes.routing.overflow.expected import block_padding
from sextant.axes.routing.overflow.shares import through


class BlockPadded(Overflow):
    """Dropless, computed as a block-diagonal matrix of ``block`` rows a block: at most ``block - 1`` rows of zeros per
    expert. FP8 products want 16 in the same way.
    """

    kind: Literal["block_padded"] = "block_padded"
    block: int = Field(default=128, ge=1)

    def compute(self, experts: Stack, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Usage]:
        return through(experts, x_TD, routing, tile=self.block)

    def padding(self, tokens: int, chosen: int, experts: int) -> float:
        return block_padding(tokens, chosen, experts, self.block)
