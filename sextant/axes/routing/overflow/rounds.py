"""Capped rounds: nothing is dropped, and no more than ``cap`` rows are at the experts at once (MAI-Base-1, 8.4).

Rows queue in the fixed order of the sorted dispatch; row q goes in round ``q // cap``. Each round is dispatched,
computed, written into the slots of its copies and forgotten: its backward computes it once more, so the bound holds for
what training keeps too. One combine at the end, in the order of the choices. Imbalance costs time, not memory.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sextant.axes.routing.base import Overflow, Routing, Stack, Usage
from sextant.axes.routing.overflow.expected import block_padding
from sextant.axes.routing.overflow.shares import through
from sextant.kernels.permute import plan
from sextant.kernels.permute.rounds import in_rounds


class CappedRounds(Overflow):
    """``cap`` rows per round, in products of exactly ``tile`` rows: the same bits as ``Dropless(tile=tile)``."""

    kind: Literal["capped_rounds"] = "capped_rounds"
    cap: int = Field(default=16384, ge=1)
    tile: int = Field(default=64, ge=1)

    @model_validator(mode="after")
    def _whole_tiles(self) -> CappedRounds:
        if self.cap % self.tile:
            raise ValueError(f"cap {self.cap} is no multiple of tile {self.tile}")
        return self

    def compute(self, experts: Stack, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Usage]:
        return fixed_tiles(experts, x_TD, routing, self.tile, self.cap)

    @property
    def keeps_rows(self) -> bool:
        return False

    def padding(self, tokens: int, chosen: int, experts: int) -> float:
        return block_padding(tokens, chosen, experts, self.tile)


def fixed_tiles(
    experts: Stack, x_TD: Tensor, routing: Routing, tile: int, cap: int | None = None
) -> tuple[Tensor, Usage]:
    """Products of ``tile`` rows, in rounds of ``cap`` rows or all in one; compilers get the sorted rows instead."""
    if torch.compiler.is_compiling():
        return through(experts, x_TD, routing, tile)
    where = plan(routing.experts_TA, experts.experts, tile, routing.kept_TA)
    total = len(where.source_N)
    cap = max(total, 1) if cap is None else cap
    y_TD = in_rounds(experts.one, x_TD, routing.gates_TA, experts.stacks, where, tile, cap)
    return y_TD, Usage(total, min(total, cap), -(-total // cap), where.padding)
