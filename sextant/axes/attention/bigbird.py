"""BigBird's pattern (2007.14062), causal: blocks of keys that are near, first, or drawn at random once and for all.

A query reads its own block and the ``window - 1`` before it, the first ``global_blocks``, and ``random`` others of its
past. The draw depends on the seed, the KV group and the number of the query's block alone, so it is the same in every
chunk and step. :func:`encoder_mask` is the published two-sided pattern (its ITC variant).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sextant.axes.attention.static import StaticPattern
from sextant.axes.kv.base import KV
from sextant.kernels.attention import Reach
from sextant.kernels.attention.span import causal


class BigBird(StaticPattern):
    """Near, first and random blocks. Any row may be drawn later, so a decoding state keeps them all.

    Attributes:
        window: blocks up to the query's own, which is counted.
        seed: of the draw; give every layer its own.
    """

    kind: Literal["bigbird"] = "bigbird"
    block: int = Field(default=64, ge=1)
    window: int = Field(default=3, ge=1)
    global_blocks: int = Field(default=2, ge=0)
    random: int = Field(default=3, ge=0)
    seed: int = Field(default=0, ge=0)

    def reaches(self, kv: KV) -> tuple[Reach, ...]:
        groups = kv.shape[1]
        seeds = [self.seed * groups + group if self.random else 0 for group in range(groups)]
        return tuple(Blocks(self.block, self.window, self.global_blocks, self.random, seed) for seed in seeds)

    def clashes(self, kv: KV, context: int) -> Iterator[tuple[str, str, str]]:
        blocks = self.window + self.global_blocks + self.random
        if blocks * self.block > context:
            what = f"{blocks} blocks of {self.block} exceed the context {context}, so all would be read"
            yield "attention.block", what, "Use kind: full, smaller or fewer blocks, or a longer context"


@dataclass(frozen=True)
class Blocks(Reach):
    """Whole blocks: the last ``window``, the first ``first``, and ``random`` in between."""

    block: int
    window: int
    first: int
    random: int
    seed: int

    @property
    def tile(self) -> int:
        return self.block

    def visible(self, q_T: Tensor, k_S: Tensor) -> Tensor:
        _, k, seen = causal(q_T, k_S)
        mine_T, theirs = q_T // self.block, k // self.block
        read = (mine_T[..., :, None] - theirs < self.window) | (theirs < self.first)
        for drawn_T in self.drawn(mine_T):
            read = read | (drawn_T[..., :, None] == theirs)
        return seen & read

    def keys(self, t_T: Tensor) -> Tensor:
        mine_T = t_T // self.block
        near_T = mine_T.clamp(max=self.window - 1)
        rest_T = (mine_T - near_T).clamp(max=self.first + self.random)
        return (near_T + rest_T) * self.block + t_T % self.block + 1

    def may_meet(self, q_first: Tensor, q_last: Tensor, k_first: Tensor, k_last: Tensor) -> Tensor:
        """Tiles are blocks, of which one pair tells all."""
        return self.visible(q_first[..., 0], k_first)

    def drawn(self, blocks_T: Tensor) -> list[Tensor]:
        """Block numbers drawn for queries of these blocks, no number twice; -1 where fewer are left to draw from.

        Floyd's sampling: the i-th draw is one of the first ``n - random + i + 1`` candidates, or the last of these
        when that one is taken.
        """
        drawn: list[Tensor] = []
        count_T = (blocks_T - self.window + 1 - self.first).clamp(min=0)
        for i in range(self.random):
            last_T = count_T - self.random + i
            pick_T = torch.where(last_T >= 0, _mixed(blocks_T, self.seed, i) % (last_T + 1).clamp(min=1), -1)
            taken_T = torch.zeros_like(pick_T, dtype=torch.bool)
            for other_T in drawn:
                taken_T |= other_T == pick_T + self.first
            pick_T = torch.where(taken_T, last_T, pick_T)
            pick_T = torch.where(count_T <= self.random, torch.where(i < count_T, i, -1), pick_T)
            drawn.append(torch.where(pick_T >= 0, pick_T + self.first, -1))
        return drawn


def _mixed(number_T: Tensor, seed: int, draw: int) -> Tensor:
    """Well mixed 32-bit numbers, the same on every device: a counter-based generator has no state to keep."""
    start = (seed * 0x85EBCA77 + draw * 0xC2B2AE3D + 1) & 0xFFFFFFFF
    x_T = (number_T * 0x9E3779B1 + start) & 0xFFFFFFFF
    for multiplier in (0x7FEB352D, 0x846CA68B):
        x_T = ((x_T ^ (x_T >> 16)) * multiplier) & 0xFFFFFFFF
    return x_T ^ (x_T >> 16)


def encoder_mask(random_MJ: Tensor) -> Tensor:
    """bool ``[M, M]`` of the published encoder, in blocks: one neighbour on each side, first and last block global.

    Args:
        random_MJ: int64, the blocks drawn for each block.
    """
    count = len(random_MJ)
    block_M = torch.arange(count, device=random_MJ.device)
    near = (block_M[:, None] - block_M).abs() <= 1
    ends_M = (block_M == 0) | (block_M == count - 1)
    return (near | ends_M[:, None] | ends_M).scatter(1, random_MJ, True)
