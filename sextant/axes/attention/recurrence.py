"""What linear mixers share: their walk over the sequences of a step, and the cost of the recurrence.

A mixer brings a :data:`Scan`, which carries equally long sequences from a state to a state; the walk gathers sequences
for it, and hands the states on. Training, prefill, chunks and decode are the same walk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sextant.core.cost import At, Cost
from sextant.core.state import Fold, LayerState, RecurrentSpec, RecurrentState
from sextant.core.stream import Stream
from sextant.kernels.linear import linear_attention

Rows = tuple[Tensor, ...]

Scan = Callable[[Rows, Tensor | None], tuple[Tensor, Tensor]]
"""Rows ``[B, T, ...]`` and the states before them, ``[B, ...]`` or None, -> outputs ``[B, T, H, V]`` and states after.
It must not hold a module: a state keeps it to redo tokens, and is copied with it.
"""


def decayed(log_decay_H: Tensor, chunk: int) -> Scan:
    """The scan of rows q, k, v with one fixed decay per head."""

    def scan(rows: Rows, before: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = rows
        return linear_attention(q, k, v, log_decay_H, before, chunk)

    return scan


def gated(chunk: int) -> Scan:
    """The scan of rows q, k, v and log decays ``[B, T, H, 1 or K]``."""

    def scan(rows: Rows, before: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v, log_decay = rows
        return linear_attention(q, k, v, log_decay, before, chunk)

    return scan


def walk(rows: Rows, stream: Stream, state: LayerState | None, scan: Scan) -> Tensor:
    """Outputs ``[T, H, V]`` of rows ``[T, ...]``: neighbouring sequences of one length go together, none sees another,
    and a state goes on from what it holds.
    """
    held = state if isinstance(state, RecurrentState) else None
    outputs, sequence, at = [], 0, 0
    for count, length in stream.runs:
        here, numbers = slice(at, at + count * length), range(sequence, sequence + count)
        at, sequence = here.stop, numbers.stop
        if here.start == here.stop:
            continue
        batch = tuple(x[here].unflatten(0, (count, length)) for x in rows)
        before = None if held is None else torch.stack([held.now[b] for b in numbers])
        o_BTHV, after = scan(batch, before)
        outputs.append(o_BTHV.flatten(0, 1))
        for i, b in enumerate(numbers if held is not None else ()):
            held.advance(b, after[i], tuple(x[i] for x in batch), _fold(scan))  # type: ignore[union-attr]
    return torch.cat(outputs) if outputs else scan(tuple(x[None] for x in rows), None)[0][0]


def _fold(scan: Scan) -> Fold:
    return lambda before, rows: scan(tuple(x[None] for x in rows), before[None])[1][0]


def recurrence_cost(heads: int, k_dim: int, v_dim: int, chunk: int, at: At) -> Cost:
    """FLOPs per token of the state's update and reading, ``4 H K V``, and of the pairs inside a chunk, ``2 H (K + V)``
    each, counted causally: about ``(chunk + 1) / 2`` of them (spec minimax-01, section 2.3). A fixed decay forms the
    upper triangle too, and drops it. One state per sequence, whatever its length.
    """
    whole, rest = divmod(at.tokens, chunk)
    pairs = (whole * chunk * (chunk + 1) + rest * (rest + 1)) / 2 / at.tokens
    state = RecurrentSpec((heads, k_dim, v_dim)).nbytes(at.tokens, at.itemsize)
    flops = heads * (4.0 * k_dim * v_dim + 2.0 * (k_dim + v_dim) * pairs)
    return Cost(flops=flops, state_bytes=state, read_bytes=state)
