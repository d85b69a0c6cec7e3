"""Which blocks does a query like best? Scores in fp32, candidates only from the finished past, ties to the lower block.

Spec sparse-attention 1.4; every method with block scores chooses here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES_AT_ONCE = 2**22
"""Scores of queries and blocks that exist at a time."""


def block_means(k_SGK: Tensor, block: int, start: int, stop: int) -> Tensor:
    """Mean keys of the complete blocks ``start`` to ``stop - 1``, ``[M, G, K]`` in fp32 (fp64 for fp64)."""
    dtype = torch.promote_types(k_SGK.dtype, torch.float32)
    return k_SGK[start * block : stop * block].unflatten(0, (stop - start, block)).mean(1, dtype=dtype)


def top_blocks(
    q_THK: Tensor, means_MGK: Tensor, first: int, block: int, top_k: int, together: bool = False, previous: int = 0
) -> Tensor:
    """The current block of each query and the ``top_k - 1`` complete past blocks with the largest ``q . mean``.

    Args:
        first: place of the first query in its sequence.
        together: the heads of a KV group choose as one, by the sum of their scores.
        previous: this many blocks before the current one are chosen first, whatever their scores.

    Returns:
        int64 ``[T, H or G, top_k]``: the current block, then the others from the best on, -1 where the past is short.
    """
    rows = max(1, SCORES_AT_ONCE // max(1, len(means_MGK) * q_THK.shape[1]))
    chosen = []
    for at, q in zip(range(first, first + len(q_THK), rows), q_THK.split(rows), strict=True):
        chosen.append(choose(_block_scores(q, means_MGK, together), at, block, top_k, previous))
    return torch.cat(chosen)


def _block_scores(q_THK: Tensor, means_MGK: Tensor, together: bool) -> Tensor:
    q_TGNK = q_THK.to(means_MGK.dtype).unflatten(1, (means_MGK.shape[1], -1))
    scores_TGNM = torch.einsum("tgnk,mgk->tgnm", q_TGNK, means_MGK)
    return scores_TGNM.sum(2) if together else scores_TGNM.flatten(1, 2)


def choose(
    scores_THM: Tensor, first: int, block: int, top_k: int, previous: int = 0, initial: int = 0
) -> Tensor:
    """The current block and the ``top_k - 1`` best scored complete past blocks, ``[T, H, top_k]``; -1 for none.

    The ``previous`` blocks before the current one and the ``initial`` ones of the sequence count as the best.
    """
    tokens, heads, count = scores_THM.shape
    current_T = torch.arange(first, first + tokens, device=scores_THM.device) // block
    back_TM = current_T[:, None] - torch.arange(count, device=scores_THM.device)
    scores_THM = scores_THM.masked_fill(back_TM[:, None] <= 0, -math.inf)
    if previous or initial:
        forced_TM = (back_TM > 0) & ((back_TM <= previous) | (torch.arange(count, device=back_TM.device) < initial))
        scores_THM = scores_THM.masked_fill(forced_TM[:, None], math.inf)
    taken = min(top_k - 1, count)
    blocks_THJ = best(scores_THM, taken)
    current_TH1 = current_T[:, None, None].expand(-1, heads, 1)
    short_THJ = blocks_THJ.new_full((tokens, heads, top_k - 1 - taken), -1)
    return torch.cat([current_TH1, blocks_THJ, short_THJ], dim=-1)


def even(chosen: Sequence[Tensor]) -> Tensor:
    """Choices of several sequences as one ``blocks_THJ``; those with fewer places get -1."""
    places = max((blocks.shape[2] for blocks in chosen), default=0)
    padded = [F.pad(blocks, (0, places - blocks.shape[2]), value=-1) for blocks in chosen]
    return torch.cat(padded) if padded else torch.empty(0, 1, 0, dtype=torch.int64)


def past_blocks(tokens: int, block: int, most: int) -> int:
    """Sum over the queries of a sequence of their complete past blocks, each counting at most ``most``."""
    blocks, rest = divmod(tokens, block)
    ramp = min(most, blocks)
    return block * (ramp * (ramp - 1) // 2 + ramp * (blocks - ramp)) + rest * ramp


def selected_keys(tokens: int, block: int, top_k: int) -> int:
    """Sum over the queries of a sequence of the keys in their own block and ``top_k - 1`` past ones."""
    blocks, rest = divmod(tokens, block)
    own = blocks * block * (block + 1) // 2 + rest * (rest + 1) // 2
    return own + block * past_blocks(tokens, block, top_k - 1)


def best(scores_THM: Tensor, count: int) -> Tensor:
    """Places of the ``count`` best scores from the best on, int64 ``[T, H, count]``; a tie goes to the lower place.

    Minus infinity is never chosen: -1 stands there.
    """
    if scores_THM.dtype != torch.float32:
        best_THJ, places_THJ = (x[..., :count] for x in scores_THM.sort(dim=-1, descending=True, stable=True))
        return places_THJ.masked_fill(best_THJ == -math.inf, -1)
    places = scores_THM.shape[-1]
    # One integer of the score's bits and, below them, the place from the end: no two are equal, so no tie is left to
    # topk, whose rule differs between devices. Bits of negative floats order backwards; -0 is to equal 0.
    bits_THM = (scores_THM + 0.0).view(torch.int32)
    bits_THM ^= (bits_THM >> 31) & 0x7FFFFFFF
    from_end_M = torch.arange(places - 1, -1, -1, device=scores_THM.device)
    keys_THJ = torch.add(from_end_M, bits_THM.long(), alpha=2**32).topk(count, dim=-1)[0]
    lowest = -0x7F800001  # these bits are those of minus infinity
    return (places - 1 - (keys_THJ & 0xFFFFFFFF)).masked_fill((keys_THJ >> 32) == lowest, -1)
