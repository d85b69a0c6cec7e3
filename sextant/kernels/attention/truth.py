"""What a block selector should have known: the largest attention weight that a query gives to a key of each block.

The teacher of SeerAttention's gates (2410.13276, 2506.08889; spec sparse-attention 8): with ``r`` the largest score of
a block and ``lse`` the row's log-sum-exp, ``exp(r - lse)``. Rows are taken a chunk at a time, so that a map ``[T, S]``
never exists: memory is ``T H M``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sextant.kernels.attention.span import Scores

CHUNK_BYTES = 64 << 20
"""Scores that exist at a time."""


@torch.no_grad()
def block_truth(q_THK: Tensor, k_SGK: Tensor, block: int, scores: Scores) -> Tensor:
    """The largest weight of full causal attention in every block, for the last T of the S tokens of one sequence.

    Returns:
        ``[T, H, M]`` in fp32 (fp64 for fp64), 0 for blocks that lie wholly after the query; M counts an unfinished
        last block. No gradient: it is a target.
    """
    tokens, heads = q_THK.shape[:2]
    first, count = len(k_SGK) - tokens, -(-len(k_SGK) // block)
    dtype = torch.promote_types(q_THK.dtype, torch.float32)
    truth_THM = torch.zeros(tokens, heads, count, dtype=dtype, device=q_THK.device)
    rows = max(1, CHUNK_BYTES // (dtype.itemsize * heads * len(k_SGK)))
    for at in range(0, tokens, rows):
        q = q_THK[at : at + rows]
        seen = k_SGK[: first + at + len(q)]
        peaks = _peaks(q.to(dtype), seen.to(dtype), block, scores.scale)
        truth_THM[at : at + rows, :, : peaks.shape[2]] = peaks
    return truth_THM


def _peaks(q_THK: Tensor, k_SGK: Tensor, block: int, scale: float) -> Tensor:
    first = len(k_SGK) - len(q_THK)
    q_TGNK = q_THK.unflatten(1, (k_SGK.shape[1], -1))
    scores_THS = torch.einsum("tgnk,sgk->tgns", q_TGNK, k_SGK).flatten(1, 2) * scale
    key_S = torch.arange(len(k_SGK), device=q_THK.device)
    later_TS = key_S > key_S[first:, None]
    scores_THS = scores_THS.masked_fill(later_TS[:, None], -math.inf)
    lse_TH1 = scores_THS.logsumexp(-1, keepdim=True)
    whole_THS = F.pad(scores_THS, (0, -len(k_SGK) % block), value=-math.inf)
    return (whole_THS.unflatten(-1, (-1, block)).amax(-1) - lse_TH1).exp()
