"""The Sparse Transformer's strided pattern (1904.10509 section 4.2): the last ``stride`` keys, and every
``stride``-th key of the whole past.

Either half of the KV groups reads each set, or all heads read both as one mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor

from sextant.axes.attention.static import StaticPattern
from sextant.axes.kv.base import KV
from sextant.kernels.attention import Reach, Span
from sextant.kernels.attention.span import causal


class Strided(StaticPattern):
    """Recent keys, and those at a distance that ``stride`` divides; ``stride`` near the root of the length is cheapest.

    Attributes:
        heads: ``split`` gives the recent keys to the first half of the KV groups, which keep a ring, and the distant
            ones to the rest; ``merged`` gives both to all.
    """

    kind: Literal["strided"] = "strided"
    stride: int = Field(ge=1)
    heads: Literal["split", "merged"] = "split"

    def reaches(self, kv: KV) -> tuple[Reach, ...]:
        groups = kv.shape[1]
        if self.heads == "merged":
            return (RecentAndStrided(self.stride),) * groups
        recent = -(-groups // 2)
        return (Span(self.stride),) * recent + (Span(dilation=self.stride),) * (groups - recent)

    def clashes(self, kv: KV, context: int) -> Iterator[tuple[str, str, str]]:
        yield from needs_two_groups(self.heads, kv)
        if self.stride > context:
            what = f"stride {self.stride} exceeds the context {context}"
            yield "attention.stride", what, "Use kind: full, a smaller stride or a longer context"


def needs_two_groups(heads: str, kv: KV) -> Iterator[tuple[str, str, str]]:
    """Heads that share their keys cannot be split into two that read apart."""
    if heads == "split" and kv.shape[1] < 2:
        yield "attention.heads", "split needs two KV heads, and there is one", "Use heads: merged, or more KV heads"


@dataclass(frozen=True)
class RecentAndStrided(Reach):
    """The last ``stride`` keys and every ``stride``-th before them."""

    stride: int

    def visible(self, q_T: Tensor, k_S: Tensor) -> Tensor:
        q, k, seen = causal(q_T, k_S)
        return seen & ((q - k < self.stride) | ((q - k) % self.stride == 0))

    def keys(self, t_T: Tensor) -> Tensor:
        return (t_T + 1).clamp(max=self.stride) + t_T // self.stride
