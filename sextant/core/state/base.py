"""Contract: what a layer declares that it remembers, and what every kind of state can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from sextant.core.errors import UsageError

if TYPE_CHECKING:
    from sextant.core.state.memory import Memory


class StateSpec(ABC):
    """What one layer remembers of one sequence."""

    @abstractmethod
    def nbytes(self, tokens: int, itemsize: int) -> int:
        """Bytes held for one sequence of ``tokens`` tokens, ``itemsize`` bytes per element of a row."""

    @abstractmethod
    def build(self, memory: Memory) -> LayerState:
        """An empty state for the sequences of ``memory``."""

    def read_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes that the step after ``tokens`` tokens reads, when it reads all that is held."""
        return self.nbytes(tokens, itemsize)


class LayerState(ABC):
    """What one layer remembers of B sequences; the concrete kinds say how it is read and extended."""

    @abstractmethod
    def keep(self, rows_B: Tensor) -> None:
        """Go on with these sequences only, in this order; a row named twice goes on twice."""

    @abstractmethod
    def rollback(self, counts: Sequence[int], lengths: Sequence[int]) -> None:
        """Forget the last ``counts[b]`` tokens of each sequence, which leaves ``lengths[b]``."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of what is in use, by the declaration's count."""


def too_far(tokens: int, undo: int) -> UsageError:
    """What a caller is told who wants more tokens back than the memory was made for."""
    return UsageError(
        "cannot roll the decoding state back", got=f"{tokens} tokens", expected=f"at most {undo}",
        fix="Make the memory with a larger undo",
    )
