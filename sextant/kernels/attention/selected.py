"""Attention over chosen blocks of keys: block-sparse, causal inside, one choice per query and head (or group, or all).

The reference is a dense mask. The blocked path has work and memory that grow with what was chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sextant.kernels.attention.reference import attend_dense
from sextant.kernels.attention.span import Scores


def attend_selected(
    q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, blocks_THJ: Tensor, block: int, scores: Scores
) -> tuple[Tensor, Tensor]:
    """Softmax attention of the last T tokens of one sequence over the chosen blocks of its S tokens.

    Query t is token ``S - T + t``; it reads key s when ``s // block`` is among its blocks and s is not after it.

    Args:
        blocks_THJ: int64 block numbers, no number twice, -1 for none; the second axis is H, G or 1.
        block: tokens of a block, counted from the sequence's first token.

    Returns:
        ``o_THV`` in the dtype of ``v`` (0 for a query that reads nothing) and ``lse_HT`` in fp32 or fp64.
    """
    return attend_selected_reference(q_THK, k_SGK, v_SGV, blocks_THJ, block, scores)


def attend_selected_reference(
    q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, blocks_THJ: Tensor, block: int, scores: Scores
) -> tuple[Tensor, Tensor]:
    """:func:`attend_selected` by a dense mask, ``T x S`` work: the truth, forward and backward."""
    first = len(k_SGK) - len(q_THK)
    distance_TS = torch.arange(first, len(k_SGK), device=q_THK.device)[:, None] - torch.arange(
        len(k_SGK), device=q_THK.device
    )
    mask_HTS = selected_mask(blocks_THJ, block, len(k_SGK), q_THK.shape[1]) & (distance_TS >= 0)
    return attend_dense(q_THK, k_SGK, v_SGV, mask_HTS, scores, distance_TS)


def selected_mask(blocks_THJ: Tensor, block: int, keys: int, heads: int) -> Tensor:
    """bool ``[H, T, S]``: key s lies in a chosen block; causality is not looked at."""
    count = -(-keys // block)
    chosen_THM = blocks_THJ.new_zeros(*blocks_THJ.shape[:2], count + 1, dtype=torch.bool)
    chosen_THM.scatter_(2, blocks_THJ.where(blocks_THJ >= 0, count), True)
    mask_THS = chosen_THM[..., :count].repeat_interleave(block, dim=2)[..., :keys]
    return mask_THS.repeat_interleave(heads // mask_THS.shape[1], dim=1).transpose(0, 1)
