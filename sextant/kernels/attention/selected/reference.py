"""Attention over chosen blocks by a dense mask: the truth for the paths whose work grows with what was chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from sextant.kernels.attention.reference import attend_dense
from sextant.kernels.attention.span import Scores


def attend_selected_reference(
    q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, blocks_THJ: Tensor, block: int, scores: Scores
) -> tuple[Tensor, Tensor]:
    """:func:`~sextant.kernels.attention.selected.attend_selected` by a dense mask: ``T x S`` work and memory."""
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
