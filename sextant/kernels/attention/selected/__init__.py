"""Attention over chosen blocks of keys: block-sparse, causal inside, one choice per query and head (or group, or all).

Work and memory grow with what was chosen, not with T x S. Short sequences go through the dense reference, where that is
faster; so does what a compiler traces, which follows plain operations best.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sextant.kernels.attention.parts import Parts, attend_parts
from sextant.kernels.attention.selected.cut import Choice, Inverted, by_blocks, by_queries
from sextant.kernels.attention.selected.reference import attend_selected_reference, selected_mask
from sextant.kernels.attention.span import Scores

__all__ = ["attend_selected", "attend_selected_reference", "selected_mask"]

DENSE_PAIRS = 2**16
"""Pairs of query and key up to which a dense mask is faster when it reads no more than four times too much (CPU)."""

SINGLE = 4
"""Blocks of fewer tokens count as single tokens: each query gathers its own."""

GATHERED_PER_BLOCK = 2500
"""Gathered keys that cost as much as handling a block: above it the queries come to the blocks (CPU, with backward)."""


def attend_selected(
    q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, blocks_THJ: Tensor, block: int, scores: Scores
) -> tuple[Tensor, Tensor]:
    """Softmax attention of the last T tokens of one sequence over the chosen blocks of its S tokens.

    Query t is token ``S - T + t``; it reads key s when ``s // block`` is among its blocks and s is not after it.

    Args:
        blocks_THJ: int64 block numbers, no number twice, -1 for none; the second axis is H, G or 1.
        block: tokens of a block, counted from the sequence's first token.

    Returns:
        ``o_THV`` in the dtype of ``v`` (0 for a query that reads nothing) and ``lse_HT`` in fp32 or fp64; both have
        gradients for q, k and v.
    """
    dense = len(q_THK) * len(k_SGK) <= DENSE_PAIRS and len(k_SGK) <= 4 * block * blocks_THJ.shape[2]
    if dense or torch.compiler.is_compiling():
        return attend_selected_reference(q_THK, k_SGK, v_SGV, blocks_THJ, block, scores)
    return attend_selected_sparse(q_THK, k_SGK, v_SGV, blocks_THJ, block, scores)


def attend_selected_sparse(
    q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, blocks_THJ: Tensor, block: int, scores: Scores
) -> tuple[Tensor, Tensor]:
    """:func:`attend_selected` by parts, of whatever length."""
    choice = Choice.of(q_THK, k_SGK, blocks_THJ, block)
    width = (k_SGK.shape[2] + v_SGV.shape[2]) * max(4, k_SGK.element_size())
    parts = _gathered(choice, width) if _gathers(choice) else _inverted(choice)
    return attend_parts(q_THK, k_SGK, v_SGV, parts, scores)


def _gathers(choice: Choice) -> bool:
    """Whether each query had better fetch its keys: few queries, or few tokens per block."""
    gathered = choice.blocks_THJ.shape[0] * choice.blocks_THJ.shape[2] * choice.lanes.count * choice.block
    return choice.block < SINGLE or gathered <= GATHERED_PER_BLOCK * (choice.lanes.keys // choice.block)


def _gathered(choice: Choice, width: int) -> Parts:
    return lambda: by_queries(choice, width)


def _inverted(choice: Choice) -> Parts:
    inverted = Inverted.of(choice)
    return lambda: by_blocks(inverted)
