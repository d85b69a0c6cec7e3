"""Which keys a query may read by the two places alone, and how a score is made of a query and a key."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


class Reach(ABC):
    """A static causal rule: key ``s`` is visible to query ``t`` by their places in the sequence alone.

    Concrete reaches are frozen dataclasses, so that what follows from one can be made once and kept.

    """

    @property
    def plain(self) -> bool:
        """The newest token sees every row that a state keeps for it."""
        return False

    @property
    def tile(self) -> int:
        """Tokens of a tile of the score matrix that suits this reach."""
        return 128

    @abstractmethod
    def visible(self, q_T: Tensor, k_S: Tensor) -> Tensor:
        """bool ``[..., T, S]`` from places within one sequence; a key place below 0 is an empty slot."""

    @abstractmethod
    def keys(self, t_T: Tensor) -> Tensor:
        """int64: how many keys the query at each place reads."""

    @property
    def kept(self) -> tuple[int | None, int]:
        """What a state must keep: the last so many tokens (None: all), and the first so many."""
        return None, 0

    def fold(self, length: int) -> Fold | None:
        """How a sequence is cut into parts that a plain span serves, where that is possible."""
        return None

    def may_meet(self, q_first: Tensor, q_last: Tensor, k_first: Tensor, k_last: Tensor) -> Tensor:
        """bool: which rectangles of places, inclusive, may hold a visible pair; more than need be is correct."""
        return k_first <= q_last

    def mean_keys(self, tokens: int) -> float:
        """Keys read per query, averaged over the places of one sequence."""
        return _mean_keys(self, tokens)


@lru_cache(maxsize=512)
def _mean_keys(reach: Reach, tokens: int) -> float:
    return int(reach.keys(torch.arange(tokens)).sum()) / tokens


def causal(q_T: Tensor, k_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Places shaped for comparison ``[..., T, 1]`` and ``[..., 1, S]``, and who lies not after whom and is no empty
    slot.
    """
    q, k = q_T[..., :, None], k_S[..., None, :]
    return q, k, (k <= q) & (k >= 0)


@dataclass(frozen=True)
class Span(Reach):
    """The last ``window`` keys (itself included; None: all), each ``dilation`` apart, and the first ``sinks`` keys."""

    window: int | None = None
    sinks: int = 0
    dilation: int = 1

    @property
    def plain(self) -> bool:
        """No gaps."""
        return self.dilation == 1

    @property
    def kept(self) -> tuple[int | None, int]:
        """Everything from the oldest key of the window on, gaps included."""
        return (None, 0) if self.window is None else ((self.window - 1) * self.dilation + 1, self.sinks)

    def visible(self, q_T: Tensor, k_S: Tensor) -> Tensor:
        q, k, seen = causal(q_T, k_S)
        if self.window is None and self.dilation == 1:
            return seen
        near = (q - k) % self.dilation == 0
        if self.window is not None:
            near &= q - k < self.window * self.dilation
        return seen & (near | (k < self.sinks))

    def keys(self, t_T: Tensor) -> Tensor:
        near_T = t_T // self.dilation + 1
        if self.window is not None:
            near_T = near_T.clamp(max=self.window)
        if self.window is None and self.dilation == 1:
            return near_T
        before_T = -(-(t_T - self.sinks + 1).clamp(min=0) // self.dilation)  # keys of the window behind the sinks
        return near_T + (t_T + 1).clamp(max=self.sinks) - (near_T - before_T).clamp(min=0)

    def fold(self, length: int) -> Fold | None:
        """Tokens of one residue class are neighbours in a sequence of their own; sinks lie across the classes."""
        if self.sinks:
            return None
        classes = [torch.arange(first, length, self.dilation) for first in range(min(self.dilation, length))]
        return Fold(torch.cat(classes), [len(members) for members in classes], Span(self.window), self.dilation)

    def may_meet(self, q_first: Tensor, q_last: Tensor, k_first: Tensor, k_last: Tensor) -> Tensor:
        meets = k_first <= q_last
        if self.window is None:
            return meets
        return meets & ((q_first - k_last < self.window * self.dilation) | (k_first < self.sinks))


@dataclass(frozen=True)
class Fold:
    """A sequence cut into parts, each a sequence of its own under a plain span.

    Attributes:
        order_T: int64, the tokens of each part end to end.
        lengths: tokens of each part.
        stretch: how far neighbours in a part lie apart in the sequence.
    """

    order_T: Tensor
    lengths: list[int]
    span: Span
    stretch: int = 1


@dataclass(frozen=True)
class Tiled:
    """A reach as the mask that :func:`~sextant.kernels.attention.tiles.attend_tiles` takes, alike for all heads."""

    reach: Reach

    def visible(self, q_NT: Tensor, k_NS: Tensor) -> Tensor:
        """bool ``[N, 1, T, S]``."""
        return self.reach.visible(q_NT, k_NS).unsqueeze(-3)

    def tiles(self, first: int, stop: int, tile: int) -> Tensor:
        """bool ``[1, T, S]`` in units of tiles."""
        k_S = torch.arange(0, stop, tile)
        q_T = k_S[first // tile :, None]
        return self.reach.may_meet(q_T, q_T + tile - 1, k_S, k_S + tile - 1)[None]


@dataclass(frozen=True)
class Scores:
    """``score = scale * q.k - slope * distance``; ``slopes_H`` is ALiBi's slope of each head, or None."""

    scale: float
    slopes_H: Tensor | None = None
