"""Attention under a static sparse mask: work and memory grow with the tiles of the score matrix that hold anything.

A mask says which pairs of places may meet and, cheaply, which tiles of ``tile x tile`` pairs are not empty.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sextant.kernels.attention.reference import attend_dense
from sextant.kernels.attention.span import Scores


class TileMask(Protocol):
    """A static mask of one sequence, by places counted from its first token; what lies after a query is never read."""

    def visible(self, q_NT: Tensor, k_NS: Tensor) -> Tensor:
        """bool ``[N, 1 or H, T, S]`` from places; N stands for any leading axes, none included."""
        ...

    def tiles(self, first: int, stop: int, tile: int) -> Tensor:
        """bool ``[1 or H, T, S]`` in units of tiles: which may hold a visible pair; a superset is correct, and slower.

        Rows are the query tiles from ``first // tile`` to ``(stop - 1) // tile``, columns the key tiles from 0 to
        ``(stop - 1) // tile``. Tiles after the diagonal are ignored.
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
    return attend_tiles_reference(q_THK, k_SGK, v_SGV, mask, scores)


def attend_tiles_reference(
    q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, mask: TileMask, scores: Scores
) -> tuple[Tensor, Tensor]:
    """:func:`attend_tiles` by a dense mask, ``T x S`` work: the truth, forward and backward."""
    k_S = torch.arange(len(k_SGK), device=q_THK.device)
    q_T = k_S[len(k_SGK) - len(q_THK) :]
    distance_TS = q_T[:, None] - k_S
    visible_HTS = mask.visible(q_T, k_S) & (distance_TS >= 0)
    return attend_dense(q_THK, k_SGK, v_SGV, visible_HTS, scores, distance_TS)


def occupied(mask: TileMask, first: int, stop: int, tile: int) -> Tensor:
    """Tiles that hold a visible pair, by looking at every pair, a row of tiles at a time: exact, for any mask."""
    k_S = torch.arange(-(-stop // tile) * tile)
    rows = []
    for q_T in torch.arange(first // tile * tile, stop).split(tile):
        visible_HTS = mask.visible(q_T, k_S) & (q_T[:, None] >= k_S)
        rows.append(visible_HTS.any(-2).unflatten(-1, (-1, tile)).any(-1))
    return torch.stack(rows, -2)
