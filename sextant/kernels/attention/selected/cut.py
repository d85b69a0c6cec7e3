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

from sextant.kernels.attention.parts import SCORES_AT_ONCE, Lanes, Part

CAUSAL_TILE = 128
"""Queries of a causal product: shorter ones waste less of the upper triangle."""

GATHERED_BYTES = 2**26
"""Keys and values that the queries of one part gather."""


@dataclass(frozen=True)
class Choice:
    """Which blocks the last T of S tokens chose: per head, per KV group, or for all."""

    blocks_THJ: Tensor
    block: int
    lanes: Lanes

    @classmethod
    def of(cls, q_THK: Tensor, k_SGK: Tensor, blocks_THJ: Tensor, block: int) -> Choice:
        (tokens, heads, _), (keys, groups, _) = q_THK.shape, k_SGK.shape
        return cls(blocks_THJ, block, Lanes(tokens, keys, heads, groups, max(groups, blocks_THJ.shape[1])))

    @property
    def choosers(self) -> int:
        return self.blocks_THJ.shape[1]

    @property
    def current_T(self) -> Tensor:
        """The block that each query lies in."""
        return torch.arange(self.lanes.first, self.lanes.keys, device=self.blocks_THJ.device) // self.block


def by_queries(choice: Choice, width: int) -> Iterator[Part]:
    """Every query with the keys that it chose, as many queries at a time as gather :data:`GATHERED_BYTES`.

    Args:
        width: bytes of a key and its value.
    """
    device, block, lanes = choice.blocks_THJ.device, choice.block, choice.lanes
    lane_H, inside = torch.arange(lanes.count, device=device), torch.arange(block, device=device)
    step = max(1, GATHERED_BYTES // max(1, lanes.count * choice.blocks_THJ.shape[2] * block * width))
    tokens = torch.arange(lanes.tokens, device=device).split(step)
    for token_T, blocks_THJ in zip(tokens, choice.blocks_THJ.split(step), strict=True):
        place_THS = (blocks_THJ[..., None] * block + inside).flatten(2)
        visible_THS = (place_THS >= 0) & (place_THS <= token_T[:, None, None] + lanes.first)
        place_MS, visible_MS = (x.expand(-1, lanes.count, -1).flatten(0, 1) for x in (place_THS, visible_THS))
        lane_M = lane_H.repeat(len(token_T))
        rows_MT = lanes.rows(token_T.repeat_interleave(lanes.count)[:, None], lane_M)
        yield Part(rows_MT, lanes.places(place_MS, lane_M), visible_MS[:, None])


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
        current = choice.current_T[:, None, None]
        own_TH = (blocks_THJ == current).any(-1)
        runs = (choice.lanes.keys - 1) // choice.block * choosers
        code_THJ = blocks_THJ * choosers + torch.arange(choosers, device=blocks_THJ.device)[:, None]
        past_THJ = (blocks_THJ >= 0) & (blocks_THJ < current)
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
    device, lanes, length = inverted.own_TH.device, inverted.choice.lanes, inverted.choice.block
    block_M = torch.arange(lanes.first // length, (lanes.keys - 1) // length + 1, device=device)
    lane_M = torch.arange(lanes.count, device=device).repeat(len(block_M))
    block_M = block_M.repeat_interleave(lanes.count)
    for start in range(0, length, CAUSAL_TILE):
        offset_S = torch.arange(min(start + CAUSAL_TILE, length), device=device)
        offset_T = offset_S[start:]
        visible_1TS = (offset_T.repeat_interleave(lanes.share)[:, None] >= offset_S)[None]
        step = max(1, SCORES_AT_ONCE[device.type] // visible_1TS.numel())
        for block, lane in zip(block_M.split(step), lane_M.split(step), strict=True):
            token_MT = _that_chose(inverted, block[:, None] * length + offset_T - lanes.first, lane)
            places_MS = lanes.places(block[:, None] * length + offset_S, lane)
            yield Part(lanes.rows(token_MT, lane), places_MS, visible_1TS)


def _that_chose(inverted: Inverted, token_MT: Tensor, lane_M: Tensor) -> Tensor:
    """The tokens that exist and chose their own block, else -1."""
    lanes = inverted.choice.lanes
    known_MT = token_MT.clamp(0, lanes.tokens - 1)
    chose_MT = inverted.own_TH[known_MT, (lane_M * inverted.choice.choosers // lanes.count)[:, None]]
    return token_MT.where(chose_MT & (known_MT == token_MT), -1)


def _past(inverted: Inverted, block: int, runs: list[tuple[int, int]]) -> Iterator[Part]:
    """A past block with the queries that chose it: the lanes side by side while that is small, else one by one."""
    lanes, length, device = inverted.choice.lanes, inverted.choice.block, inverted.token_N.device
    per_run = lanes.count // len(runs)
    longest = max(stop - start for start, stop in runs)
    limit = max(1, SCORES_AT_ONCE[device.type] // (length * lanes.share * per_run))
    lane_M, place_S = torch.arange(lanes.count, device=device), torch.arange(length, device=device)
    places_MS = lanes.places((block * length + place_S).expand(lanes.count, -1), lane_M)
    if longest * len(runs) <= limit:
        if longest:
            token_MT = _side_by_side(inverted, runs).repeat_interleave(per_run, dim=0)
            yield Part(lanes.rows(token_MT, lane_M), places_MS)
        return
    for number, (start, stop) in enumerate(runs):
        here = slice(number * per_run, (number + 1) * per_run)
        for token_T in inverted.token_N[start:stop].split(limit):
            yield Part(lanes.rows(token_T.expand(per_run, -1), lane_M[here]), places_MS[here])


def _side_by_side(inverted: Inverted, runs: list[tuple[int, int]]) -> Tensor:
    """Tokens of each run, filled up with -1."""
    rows = [inverted.token_N[start:stop] for start, stop in runs]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
