"""Several states of one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from sextant.core.state.base import LayerState, StateSpec

if TYPE_CHECKING:
    from sextant.core.state.memory import Memory

S = TypeVar("S", bound=LayerState)


@dataclass(frozen=True)
class JointSpec(StateSpec):
    """Several states of one layer, by name."""

    parts: tuple[tuple[str, StateSpec], ...]

    @classmethod
    def of(cls, **parts: StateSpec) -> JointSpec:
        return cls(tuple(parts.items()))

    def nbytes(self, tokens: int, itemsize: int) -> int:
        return sum(part.nbytes(tokens, itemsize) for _, part in self.parts)

    def build(self, memory: Memory) -> JointState:
        return JointState({name: part.build(memory) for name, part in self.parts})


class JointState(LayerState):
    """Several states of one layer: ``state.part("means", BlockState)``."""

    def __init__(self, parts: Mapping[str, LayerState]):
        self.parts = parts

    def part(self, name: str, kind: type[S]) -> S:
        """The state of this name, which is of this kind."""
        part = self.parts[name]
        if not isinstance(part, kind):
            raise TypeError(f"{name} is a {type(part).__name__}, not a {kind.__name__}")
        return part

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def keep(self, rows_B: Tensor) -> None:
        for part in self.parts.values():
            part.keep(rows_B)

    def rollback(self, counts: Sequence[int], lengths: Sequence[int]) -> None:
        for part in self.parts.values():
            part.rollback(counts, lengths)
