"""The states of all layers for the sequences of a batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from sextant.core.state.base import StateSpec, too_far
from sextant.core.state.rows import Slots
from sextant.core.stream import Stream


class Memory:
    """The states of all layers for B sequences, and how many tokens each sequence has so far.

    Attributes:
        undo: tokens that :meth:`rollback` can take back at any time, which rings and recurrent states pay for.
    """

    def __init__(
        self, specs: Sequence[StateSpec], batch: int, dtype: torch.dtype, device: torch.device | str = "cpu",
        undo: int = 0,
    ):
        self.batch, self.dtype, self.device, self.undo = batch, dtype, device, undo
        self.slots: dict[tuple[int | None, int], Slots] = {}
        self.layers = [spec.build(self) for spec in specs]
        self.lengths = [0] * batch

    def slots_of(self, window: int | None, sinks: int) -> Slots:
        """The one count of slots for all states with this window and this many sinks."""
        new = Slots(window, sinks, self.batch, self.device, self.undo)
        return self.slots.setdefault((window, sinks), new)

    def commit(self, stream: Stream) -> None:
        """Count the tokens of a finished step."""
        self.lengths = [length + new for length, new in zip(self.lengths, stream.lengths, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only, in this order: finished ones leave the batch, one named twice is shared."""
        self.batch = len(rows)
        self.lengths = [self.lengths[b] for b in rows]
        for slots in self.slots.values():
            slots.keep(rows)
        for layer in self.layers:
            layer.keep(torch.tensor(rows, device=self.device))

    def fork(self, rows: Sequence[int] | None = None) -> Memory:
        """A memory of its own that goes on from here, for these sequences (all by default)."""
        other = copy.deepcopy(self)
        if rows is not None:
            other.keep(rows)
        return other

    def rollback(self, counts: int | Sequence[int]) -> None:
        """Forget the last tokens, as if they had never been fed: ``counts`` for all, or for each sequence.

        Raises:
            UsageError: more than a sequence has, or than ``undo`` promised where something was let go.
        """
        counts = [counts] * self.batch if isinstance(counts, int) else list(counts)
        left = [length - count for length, count in zip(self.lengths, counts, strict=True)]
        if min(left, default=0) < 0 or min(counts, default=0) < 0:
            raise too_far(max(counts), min(self.lengths))
        for slots in self.slots.values():
            slots.rollback(counts)
        for layer in self.layers:
            layer.rollback(counts, left)
        self.lengths = left

    @property
    def nbytes(self) -> int:
        """Bytes of all that is in use."""
        return sum(layer.nbytes for layer in self.layers)
