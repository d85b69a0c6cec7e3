"""How a choice of blocks is cut into parts: by the blocks, or by the queries.

By blocks (what training does): the queries that chose a block meet it in one product; the block that a query lies in
is causal inside, and its queries sit together already. By queries (single tokens instead of blocks, or few queries):
each query gathers its own keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sextant.kernels.attention.parts import Part

CAUSAL_TILE = 128
"""Queries of a causal product: shorter ones waste less of the upper triangle."""

SCORES_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}
"""Scores of a part: what a CPU likes best, and enough to fill a GPU."""

GATHERED_BYTES = 2**26
"""Keys and values that the queries of one part gather."""


@dataclass(frozen=True)
class Choice:
    """Which blocks the last T of S tokens chose.

    Heads that choose alike and share keys form a lane: a lane is a query head, or a KV group with all its heads.

    Attributes:
        blocks_THJ: one choice per head, per group, or for all.
    """

    blocks_THJ: Tensor
    block: int
    keys: int
    heads: int
    groups: int

    @property
    def tokens(self) -> int:
        return self.blocks_THJ.shape[0]

    @property
    def choosers(self) -> int:
        return self.blocks_THJ.shape[1]

    @property
    def first(self) -> int:
        return self.keys - self.tokens

    @property
    def lanes(self) -> int:
        return max(self.groups, self.choosers)

    @property
    def current_T(self) -> Tensor:
        """The block that each query lies in."""
        return torch.arange(self.first, self.keys, device=self.blocks_THJ.device) // self.block

    def rows(self, token_MT: Tensor, lane_M: Tensor) -> Tensor:
        """Rows of :class:`Part` for tokens of lanes, -1 for none: the heads of a lane follow each other."""
        share = self.heads // self.lanes
        head_MH = lane_M[:, None] * share + torch.arange(share, device=lane_M.device)
        rows_MTH = token_MT[..., None] * self.heads + head_MH[:, None]
        return rows_MTH.masked_fill(token_MT[..., None] < 0, self.tokens * self.heads).flatten(1)

    def places(self, place_MS: Tensor, lane_M: Tensor) -> Tensor:
        """Key rows of :class:`Part`; a place after the last key, which no query sees, stands at the last."""
        return place_MS.clamp(0, self.keys - 1) * self.groups + (lane_M * self.groups // self.lanes)[:, None]


def by_queries(choice: Choice, width: int) -> Iterator[Part]:
    """Every query with the keys that it chose, as many queries at a time as gather :data:`GATHERED_BYTES`.

    Args:
        width: bytes of a key and its value.
    """
    device, block = choice.blocks_THJ.device, choice.block
    lane_H, inside = torch.arange(choice.lanes, device=device), torch.arange(block, device=device)
    reads = choice.blocks_THJ.shape[2] * block
    step = max(1, GATHERED_BYTES // max(1, choice.lanes * reads * width))
    for token_T, blocks_THJ in zip(
        torch.arange(choice.tokens, device=device).split(step), choice.blocks_THJ.split(step), strict=True
    ):
        place_THS = (blocks_THJ[..., None] * block + inside).flatten(2)
        visible_THS = (place_THS >= 0) & (place_THS <= token_T[:, None, None] + choice.first)
        place_MS, visible_MS = (x.expand(-1, choice.lanes, -1).flatten(0, 1) for x in (place_THS, visible_THS))
        lane_M = lane_H.repeat(len(token_T))
        rows_MT = choice.rows(token_T.repeat_interleave(choice.lanes)[:, None], lane_M)
        yield Part(rows_MT, choice.places(place_MS, lane_M), visible_MS[:, None])


@dataclass(frozen=True)
class Inverted:
    """A choice turned round, block -> queries, by one sort; the only transfer to the host is the counts.

    Attributes:
        token_N: the queries, by block, then chooser, then place.
        ends: ends of the runs of ``token_N``, one per block and chooser, led by 0.
        own_TH: whether a query chose the block that it lies in.
        any_own: whether one did.
    """

    choice: Choice
    token_N: Tensor
    ends: list[int]
    own_TH: Tensor
    any_own: bool

    @classmethod
    def of(cls, choice: Choice) -> Inverted:
        blocks_THJ, choosers = choice.blocks_THJ, choice.choosers
        current_T11 = choice.current_T[:, None, None]
        own_TH = (blocks_THJ == current_T11).any(-1)
        runs = (choice.keys - 1) // choice.block * choosers
        code_THJ = blocks_THJ * choosers + torch.arange(choosers, device=blocks_THJ.device)[:, None]
        past_THJ = (blocks_THJ >= 0) & (blocks_THJ < current_T11)
        code_N, order_N = code_THJ.where(past_THJ, runs).to(torch.int32).flatten().sort(stable=True)
        starts = torch.arange(runs + 1, device=code_N.device, dtype=torch.int32)
        ends = torch.cat([torch.searchsorted(code_N, starts), own_TH.any()[None].long()]).tolist()
        return cls(choice, order_N // max(1, choosers * blocks_THJ.shape[2]), ends[:-1], own_TH, bool(ends[-1]))


def by_blocks(inverted: Inverted) -> Iterator[Part]:
    """Every block with the queries that chose it."""
    if inverted.any_own:
        yield from _own(inverted)
    runs = list(pairwise(inverted.ends))
    for block in range(len(runs) // inverted.choice.choosers):
        yield from _past(inverted, block, runs[block * inverted.choice.choosers :][: inverted.choice.choosers])


def _own(inverted: Inverted) -> Iterator[Part]:
    """The blocks that queries lie in: causal, a strip of queries at a time over the keys up to its end."""
    choice, device = inverted.choice, inverted.own_TH.device
    lanes, share = choice.lanes, choice.heads // choice.lanes
    block_M = torch.arange(choice.first // choice.block, (choice.keys - 1) // choice.block + 1, device=device)
    block_M, lane_M = block_M.repeat_interleave(lanes), torch.arange(lanes, device=device).repeat(len(block_M))
    for start in range(0, choice.block, CAUSAL_TILE):
        offset_S = torch.arange(min(start + CAUSAL_TILE, choice.block), device=device)
        offset_T = offset_S[start:]
        visible_1TS = (offset_T.repeat_interleave(share)[:, None] >= offset_S)[None]
        step = max(1, SCORES_AT_ONCE[device.type] // visible_1TS.numel())
        for block, lane in zip(block_M.split(step), lane_M.split(step), strict=True):
            token_MT = block[:, None] * choice.block + offset_T - choice.first
            places_MS = choice.places(block[:, None] * choice.block + offset_S, lane)
            yield Part(choice.rows(_that_chose(inverted, token_MT, lane), lane), places_MS, visible_1TS)


def _that_chose(inverted: Inverted, token_MT: Tensor, lane_M: Tensor) -> Tensor:
    """The tokens that exist and chose their own block, else -1."""
    known_MT = token_MT.clamp(0, inverted.choice.tokens - 1)
    chose_MT = inverted.own_TH[known_MT, (lane_M * inverted.choice.choosers // inverted.choice.lanes)[:, None]]
    return token_MT.where(chose_MT & (known_MT == token_MT), -1)


def _past(inverted: Inverted, block: int, runs: list[tuple[int, int]]) -> Iterator[Part]:
    """A past block with the queries that chose it: the lanes side by side while that is small, else one by one."""
    choice, device = inverted.choice, inverted.token_N.device
    per_run = choice.lanes // choice.choosers
    longest = max(stop - start for start, stop in runs)
    limit = max(1, SCORES_AT_ONCE[device.type] // (choice.block * (choice.heads // choice.lanes) * per_run))
    lane_M, place_S = torch.arange(choice.lanes, device=device), torch.arange(choice.block, device=device)
    place_MS = choice.places((block * choice.block + place_S).expand(choice.lanes, -1), lane_M)
    if longest * len(runs) <= limit:
        yield from [Part(choice.rows(_side_by_side(inverted, runs, longest), lane_M), place_MS)] * (longest > 0)
        return
    for number, (start, stop) in enumerate(runs):
        here = slice(number * per_run, (number + 1) * per_run)
        for token_T in inverted.token_N[start:stop].split(limit):
            yield Part(choice.rows(token_T.expand(per_run, -1), lane_M[here]), place_MS[here])


def _side_by_side(inverted: Inverted, runs: list[tuple[int, int]], longest: int) -> Tensor:
    """Tokens of each lane, filled up with -1."""
    rows = [inverted.token_N[start:stop] for start, stop in runs]
    token_MT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    return token_MT.repeat_interleave(inverted.choice.lanes // len(runs), dim=0)
