"""Attention under a static sparse mask: work and memory grow with the tiles of the score matrix that hold anything.

A mask says which pairs of places may meet and, cheaply, which tiles of ``tile x tile`` pairs are not empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from sextant.kernels.attention.parts import SCORES_AT_ONCE, Lanes, Part, attend_parts
from sextant.kernels.attention.reference import attend_dense
from sextant.kernels.attention.span import Scores

DENSE_PAIRS = 2**16
"""Pairs of query and key up to which the dense mask is faster, measured on a CPU."""


class TileMask(Protocol):
    """A static mask of one sequence, by places counted from its first token; what lies after a query is never read."""

    def visible(self, q_NT: Tensor, k_NS: Tensor) -> Tensor:
        """bool ``[N, 1 or H, T, S]`` from places; N stands for any leading axes, none included."""
        ...

    def tiles(self, first: int, stop: int, tile: int) -> Tensor:
        """bool ``[1 or H, T, S]`` in units of tiles: which may hold a visible pair; a superset is correct, and slower.

        Rows are the query tiles from ``first // tile`` to ``(stop - 1) // tile``, columns the key tiles from 0 to
        ``(stop - 1) // tile``. Tiles after the diagonal are ignored. Heads go together, over what any of them may see.
        """
        ...


def attend_tiles(
    q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, mask: TileMask, scores: Scores, tile: int = 128
) -> tuple[Tensor, Tensor]:
    """Softmax attention of the last T tokens of one sequence over the keys that a static mask allows.

    Query t is token ``S - T + t``; it reads key s when the mask says so and s is not after it.

    Args:
        tile: tokens of a tile, counted from the sequence's first token.

    Returns:
        ``o_THV`` in the dtype of ``v`` (0 for a query that reads nothing) and ``lse_HT`` in fp32 or fp64.
    """
    if len(q_THK) * len(k_SGK) <= DENSE_PAIRS or torch.compiler.is_compiling():
        return attend_tiles_reference(q_THK, k_SGK, v_SGV, mask, scores)
    return attend_tiles_sparse(q_THK, k_SGK, v_SGV, mask, scores, tile)


def attend_tiles_sparse(
    q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, mask: TileMask, scores: Scores, tile: int = 128
) -> tuple[Tensor, Tensor]:
    """:func:`attend_tiles` by parts, of whatever length."""
    (tokens, heads, _), (keys, groups, _) = q_THK.shape, k_SGK.shape
    lanes = Lanes(tokens, keys, heads, groups, groups)
    layout_TS = mask.tiles(lanes.first, keys, tile).any(0).cpu()
    return attend_parts(q_THK, k_SGK, v_SGV, lambda: _cut(mask, layout_TS, tile, lanes, q_THK.device), scores)


def attend_tiles_reference(
    q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, mask: TileMask, scores: Scores
) -> tuple[Tensor, Tensor]:
    """:func:`attend_tiles` by a dense mask, ``T x S`` work: the truth, forward and backward."""
    k_S = torch.arange(len(k_SGK), device=q_THK.device)
    q_T = k_S[len(k_SGK) - len(q_THK) :]
    distance_TS = q_T[:, None] - k_S
    visible_HTS = mask.visible(q_T, k_S) & (distance_TS >= 0)
    return attend_dense(q_THK, k_SGK, v_SGV, visible_HTS, scores, distance_TS)


def _cut(mask: TileMask, layout_TS: Tensor, tile: int, lanes: Lanes, device: torch.device) -> Iterator[Part]:
    """Rows of tiles with equally many tiles to read go together, a few of these tiles at a time."""
    row_T = torch.arange(len(layout_TS)) + lanes.first // tile
    layout_TS = layout_TS & (torch.arange(layout_TS.shape[1]) <= row_T[:, None])
    across = max(1, SCORES_AT_ONCE[device.type] // (lanes.heads * tile * tile))
    reads_T = layout_TS.sum(1)
    for reads in reads_T.unique().tolist():
        alike_N = (reads_T == reads).nonzero()[:, 0]
        columns_NM = layout_TS[alike_N].nonzero()[:, 1].view(len(alike_N), reads)
        for columns in columns_NM.split(across, dim=1) if reads else ():
            down = max(1, across // columns.shape[1])
            for row, column in zip(row_T[alike_N].split(down), columns.split(down), strict=True):
                yield _part(mask, row.to(device), column.to(device), tile, lanes)


def _part(mask: TileMask, row_N: Tensor, column_NM: Tensor, tile: int, lanes: Lanes) -> Part:
    inside = torch.arange(tile, device=row_N.device)
    q_NT, k_NS = row_N[:, None] * tile + inside, (column_NM[..., None] * tile + inside).flatten(1)
    lane_M = torch.arange(lanes.count, device=row_N.device).repeat(len(row_N))
    token_NT = (q_NT - lanes.first).masked_fill(q_NT >= lanes.keys, -1)
    token_MT, place_MS = (x.repeat_interleave(lanes.count, dim=0) for x in (token_NT, k_NS))
    visible_NHTS = mask.visible(q_NT, k_NS) & (q_NT[..., None] >= k_NS[:, None])[:, None]
    visible_MTS = _by_lanes(visible_NHTS, lanes)
    return Part(lanes.rows(token_MT, lane_M), lanes.places(place_MS, lane_M), visible_MTS)


def _by_lanes(visible_NHTS: Tensor, lanes: Lanes) -> Tensor:
    """``[N * G, T * heads of a group, S]``, as the rows of a part follow each other."""
    visible_NGHTS = visible_NHTS.expand(-1, lanes.heads, -1, -1).unflatten(1, (lanes.count, lanes.share))
    return visible_NGHTS.transpose(2, 3).flatten(2, 3).flatten(0, 1)


def occupied(mask: TileMask, first: int, stop: int, tile: int) -> Tensor:
    """Tiles that hold a visible pair, by looking at every pair, a row of tiles at a time: exact, for any mask."""
    k_S = torch.arange(-(-stop // tile) * tile)
    rows = []
    for q_T in torch.arange(first // tile * tile, stop).split(tile):
        visible_HTS = mask.visible(q_T, k_S) & (q_T[:, None] >= k_S)
        rows.append(visible_HTS.any(-2).unflatten(-1, (-1, tile)).any(-1))
    return torch.stack(rows, -2)
