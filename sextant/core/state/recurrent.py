"""One tensor per sequence, whatever its length: what linear mixers remember."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sextant.core.state.base import LayerState, StateSpec, too_far

if TYPE_CHECKING:
    from sextant.core.state.memory import Memory


Fold = Callable[[Tensor, tuple[Tensor, ...]], Tensor]
"""A recurrent state and the rows of some tokens, ``[T, ...]`` each -> the state after them."""


@dataclass(frozen=True)
class RecurrentSpec(StateSpec):
    """One tensor of ``shape`` per sequence, fp32 (fp64 beside fp64 rows), whatever the sequence's length.

    It is the true state after the tokens so far, not yet decayed for the next one (spec minimax-01, section 3.4).
    """

    shape: tuple[int, ...]

    def nbytes(self, tokens: int, itemsize: int) -> int:
        return 4 * math.prod(self.shape)

    def build(self, memory: Memory) -> RecurrentState:
        return RecurrentState(self, memory)


class RecurrentState(LayerState):
    """One tensor ``[*shape]`` per sequence, and, to undo, an older one with the rows of the tokens since.

    A recurrence is never undone algebraically, which would lose what a decay has rounded away: the tokens that stay are
    folded into the older state again.
    """

    def __init__(self, spec: RecurrentSpec, memory: Memory):
        self.spec, self.undo = spec, memory.undo
        dtype = torch.promote_types(memory.dtype, torch.float32)
        self.now = [torch.zeros(spec.shape, dtype=dtype, device=memory.device) for _ in range(memory.batch)]
        self.base = list(self.now)
        self.rows: list[tuple[Tensor, ...]] = [()] * memory.batch
        self.fold: Fold | None = None

    def advance(self, b: int, after: Tensor, rows: tuple[Tensor, ...], fold: Fold) -> None:
        """Sequence ``b`` is now at ``after``, through ``rows`` ``[T, ...]`` of this step; ``fold`` would redo it."""
        self.now[b], self.fold = after, fold
        if not self.undo:
            return
        held = self.rows[b]
        if not held and len(rows[0]) > 2 * self.undo:  # a prompt: only its end can be taken back, and is copied out
            self.base[b] = fold(self.base[b], tuple(x[: -self.undo] for x in rows))
            self.rows[b] = tuple(x[-self.undo :].clone() for x in rows)
            return
        self.rows[b] = tuple(torch.cat(pair) for pair in zip(held, rows, strict=True)) if held else rows
        spare = len(self.rows[b][0]) - self.undo
        if spare > self.undo:  # let the older state catch up now and then, not at every token
            self.base[b] = fold(self.base[b], tuple(x[:spare] for x in self.rows[b]))
            self.rows[b] = tuple(x[spare:] for x in self.rows[b])

    @property
    def nbytes(self) -> int:
        return 4 * math.prod(self.spec.shape) * len(self.now)

    def keep(self, rows_B: Tensor) -> None:
        rows = rows_B.tolist()
        self.now, self.base = [self.now[b] for b in rows], [self.base[b] for b in rows]
        self.rows = [self.rows[b] for b in rows]

    def rollback(self, counts: Sequence[int], lengths: Sequence[int]) -> None:
        for b, count in enumerate(counts):
            if not count:
                continue
            held = len(self.rows[b][0]) if self.rows[b] else 0
            if count > held or self.fold is None:
                raise too_far(count, self.undo)
            self.rows[b] = tuple(x[: held - count] for x in self.rows[b])
            self.now[b] = self.fold(self.base[b], self.rows[b]) if held > count else self.base[b]
