"""Documents into rows: two packers with the same shape, as pure functions of lengths and an order.

A row has ``seq_len`` inputs. Each token of an epoch is an input exactly once and, but for the first of each document, a
target exactly once: a row that ends inside a document also holds the token that follows, as its last target.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Piece = tuple[int, int, int]
"""Document, first token and end (exclusive) in it."""


class Packing(Protocol):
    """One epoch, row by row."""

    @property
    def rows(self) -> int: ...

    def pieces(self, row: int) -> list[Piece]:
        """The pieces of a row in order; at most ``seq_len + 1`` tokens."""
        ...


@dataclass(frozen=True)
class Concat:
    """Documents end to end, cut every ``seq_len`` tokens. Only the epoch's last row may be shorter.

    Attributes:
        order_N: int64, documents in the order of the epoch.
        ends_N: int64, where each of them ends in the epoch's stream.
    """

    order_N: np.ndarray
    ends_N: np.ndarray
    seq_len: int

    @classmethod
    def of(cls, lengths_N: np.ndarray, order_N: np.ndarray, seq_len: int) -> Concat:
        """From document lengths in tokens and their order."""
        return cls(order_N, np.cumsum(lengths_N[order_N], dtype=np.int64), seq_len)

    @property
    def rows(self) -> int:
        return -(-int(self.ends_N[-1]) // self.seq_len) if len(self.ends_N) else 0

    def pieces(self, row: int) -> list[Piece]:
        at, stop = row * self.seq_len, min((row + 1) * self.seq_len + 1, int(self.ends_N[-1]))
        place = int(np.searchsorted(self.ends_N, at, side="right"))
        found = []
        while at < stop:
            begin = int(self.ends_N[place - 1]) if place else 0
            end = min(int(self.ends_N[place]), stop)
            if end > at:
                found.append((int(self.order_N[place]), at - begin, end - begin))
            at, place = max(at, end), place + 1
        return found


@dataclass(frozen=True)
class BestFit:
    """Documents whole where they fit: long ones give full rows, and what is left is packed best-fit decreasing.

    The number of rows depends on the lengths alone, so every epoch has as many. Source: Ding et al. 2024,
    arXiv 2404.10830.

    Attributes:
        full_N2: int64, document and first token of each row that lies inside one document.
        bins: pieces of every other row.
        lengths_N: int64, document lengths in tokens.
    """

    full_N2: np.ndarray
    bins: list[list[Piece]]
    lengths_N: np.ndarray
    seq_len: int

    @classmethod
    def of(cls, lengths_N: np.ndarray, order_N: np.ndarray, seq_len: int) -> BestFit:
        """From document lengths in tokens; equal lengths are taken in the given order."""
        whole_N = lengths_N // seq_len
        counts_N = whole_N[order_N]
        documents = np.repeat(order_N, counts_N)
        firsts = (np.arange(len(documents)) - np.repeat(np.cumsum(counts_N) - counts_N, counts_N)) * seq_len
        rests_N = lengths_N - whole_N * seq_len
        decreasing = order_N[np.argsort(-rests_N[order_N], kind="stable")]
        items = [(int(d), int(rests_N[d])) for d in decreasing if rests_N[d]]
        bins = [[(d, int(lengths_N[d]) - n, int(lengths_N[d])) for d, n in row] for row in best_fit(items, seq_len)]
        return cls(np.stack([documents, firsts], axis=1).astype(np.int64), bins, lengths_N, seq_len)

    @property
    def rows(self) -> int:
        return len(self.full_N2) + len(self.bins)

    def pieces(self, row: int) -> list[Piece]:
        if row >= len(self.full_N2):
            return self.bins[row - len(self.full_N2)]
        document, first = (int(value) for value in self.full_N2[row])
        return [(document, first, min(first + self.seq_len + 1, int(self.lengths_N[document])))]


def best_fit(items: list[tuple[int, int]], room: int) -> list[list[tuple[int, int]]]:
    """Put (name, length) items, longest first, each into the fullest bin of size ``room`` that takes it."""
    bins: list[list[tuple[int, int]]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # keys of by_room that hold a bin, ascending
    for name, length in items:
        place = bisect_left(rooms, length)
        if place == len(rooms):
            chosen, left = len(bins), room - length
            bins.append([(name, length)])
        else:
            chosen, left = by_room[rooms[place]].pop(), rooms[place] - length
            bins[chosen].append((name, length))
            if not by_room[rooms[place]]:
                del by_room[rooms.pop(place)]
        if left:
            if left not in by_room:
                insort(rooms, left)
            by_room.setdefault(left, []).append(chosen)
    return bins


PACKINGS = {"concat": Concat.of, "best_fit": BestFit.of}
