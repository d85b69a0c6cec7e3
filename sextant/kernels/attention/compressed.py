"""Attention to compressed keys, each made of a window of tokens, and what it says about the blocks they lie in.

Windows of ``length`` tokens start every ``stride`` tokens; blocks of ``block`` tokens are chosen by the weights that a
query gives to the windows. The scores of T queries to T / stride windows are quadratic, so queries are taken in pieces
that fit :data:`PIECE_BYTES`, and backward makes the weights of a piece again (spec sparse-attention 5, 7).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sextant.kernels.attention.span import Scores

PIECE_BYTES = 64 * 2**20
"""The largest ``[G, T, N, S]`` of scores that is held at once, in fp32."""

Choose = Callable[[Tensor, int], Tensor]
"""Weights ``[T, G, S]`` of windows, summed over a group's heads, and the first query's place -> ``blocks_TGJ``."""


@dataclass(frozen=True)
class Grid:
    """Windows and blocks of one sequence, both counted from its first token; ``stride`` divides the other two."""

    length: int
    stride: int
    block: int

    def complete(self, tokens: int) -> int:
        """Windows that end within the first ``tokens`` tokens."""
        return max(0, (tokens - self.length) // self.stride + 1)

    def all_complete(self, tokens: int) -> int:
        """Windows that a query sees, added up over the queries of a sequence."""
        count = self.complete(tokens)
        return count * (tokens - self.length + 1) - self.stride * count * (count - 1) // 2

    def windows(self, rows: Tensor, tokens: int, start: int, stop: int) -> Tensor:
        """Rows ``[M, length, ...]`` of the windows ``start`` to ``stop - 1``; ``rows`` are the last of ``tokens``."""
        if stop <= start:
            return rows[:0, None].expand(-1, self.length, *rows.shape[1:])  # not a new tensor: gradients stay defined
        missing = tokens - len(rows)
        own = rows[start * self.stride - missing : (stop - 1) * self.stride + self.length - missing]
        return own.unfold(0, self.length, self.stride).movedim(-1, 1)

    def touching(self, weights_TGS: Tensor, tokens: int) -> Tensor:
        """Weights of the windows that share tokens with each block of ``tokens`` tokens, ``[T, G, M, n]``.

        ``n`` is ``block / stride + length / stride - 1``; windows that are not there weigh 0.
        """
        before, per_block = self.length // self.stride - 1, self.block // self.stride
        blocks = -(-tokens // self.block)
        padded = F.pad(weights_TGS, (before, blocks * per_block - weights_TGS.shape[-1]))
        return padded.unfold(-1, per_block + before, per_block)

    def overlaps(self) -> list[int]:
        """Strides that a block shares with each window touching it: 1, 2, 2, 2, 1 for windows of 2 in blocks of 4."""
        length, block = self.length // self.stride, self.block // self.stride
        return [min(w + length, block) - max(w, 0) for w in range(1 - length, block)]

    def importance(self, weights_TGS: Tensor, tokens: int) -> Tensor:
        """Block scores ``[T, G, M]``: windows count by how much of a block they cover (NSA, equation 9)."""
        return self.touching(weights_TGS, tokens) @ weights_TGS.new_tensor(self.overlaps())


def attend_compressed(
    q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, first: int, grid: Grid, scores: Scores, choose: Choose
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the complete windows of the past, and the blocks that ``choose`` makes of its weights.

    Args:
        k_SGK, v_SGV: compressed keys and values, window by window.
        first: place of the first query in its sequence.

    Returns:
        ``o_THV`` in the dtype of ``v``, 0 where no window is complete, and ``blocks_TGJ`` (no gradient).
    """

    def run(q: Tensor, k: Tensor, v: Tensor, at: int) -> tuple[Tensor, Tensor]:
        weights_GTNS = window_weights(q, k, at, grid, scores)
        o_TGNV = torch.einsum("gtns,sgv->tgnv", weights_GTNS, v.to(weights_GTNS.dtype))
        o_THV = o_TGNV.flatten(1, 2).to(v.dtype)
        with torch.no_grad():  # last, so that a recomputation stops before it
            blocks_TGJ = choose(weights_GTNS.sum(2).transpose(0, 1), at)
        return o_THV, blocks_TGJ

    pieces, outputs, chosen = list(_pieces(q_THK, k_SGK, first, grid)), [], []
    again = len(pieces) > 1 and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    for q, at, seen in pieces:
        one = (q, k_SGK[:seen], v_SGV[:seen], at)
        o, blocks = checkpoint(run, *one, use_reentrant=False, preserve_rng_state=False) if again else run(*one)
        outputs.append(o)
        chosen.append(blocks)
    return torch.cat(outputs), torch.cat(chosen)


@torch.no_grad()
def choose_compressed(
    q_THK: Tensor, k_SGK: Tensor, first: int, grid: Grid, scores: Scores, choose: Choose
) -> Tensor:
    """``blocks_TGJ`` as :func:`attend_compressed` gives them, where the windows have no values."""
    chosen = []
    for q, at, seen in _pieces(q_THK, k_SGK, first, grid):
        weights_GTNS = window_weights(q, k_SGK[:seen], at, grid, scores)
        chosen.append(choose(weights_GTNS.sum(2).transpose(0, 1), at))
    return torch.cat(chosen)


def window_weights(q_THK: Tensor, k_SGK: Tensor, first: int, grid: Grid, scores: Scores) -> Tensor:
    """Softmax over the windows complete before each query, ``[G, T, N, S]`` for N heads of a group, in fp32 (fp64)."""
    dtype = torch.promote_types(q_THK.dtype, torch.float32)
    q_TGNK = (q_THK.to(dtype) * scores.scale).unflatten(1, (k_SGK.shape[1], -1))
    scores_GTNS = torch.einsum("tgnk,sgk->gtns", q_TGNK, k_SGK.to(dtype))
    last_S = torch.arange(len(k_SGK), device=q_THK.device) * grid.stride + grid.length - 1
    position_T = torch.arange(first, first + len(q_THK), device=q_THK.device)
    # Queries before the first window's end look at it, so that softmax has something, and are then told to forget it.
    hidden_TS = last_S > position_T[:, None].clamp(min=grid.length - 1)
    weights_GTNS = scores_GTNS.masked_fill_(hidden_TS[:, None], -math.inf).softmax(-1)
    if first >= grid.length - 1:
        return weights_GTNS
    return weights_GTNS * (position_T >= grid.length - 1)[:, None, None]


def _pieces(q_THK: Tensor, k_SGK: Tensor, first: int, grid: Grid) -> Iterator[tuple[Tensor, int, int]]:
    """Queries, the first one's place, and how many windows the last one sees."""
    rows = max(1, PIECE_BYTES // (4 * q_THK.shape[1] * max(1, len(k_SGK))))
    for start in range(0, len(q_THK), rows):
        q = q_THK[start : start + rows]
        yield q, first + start, grid.complete(first + start + len(q))
