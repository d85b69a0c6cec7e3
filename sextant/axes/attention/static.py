"""Static patterns: which keys a query reads follows from the two places in the sequence, and from the KV group.

A pattern says one :class:`~sextant.kernels.attention.Reach` for each KV group. Groups that must keep the same rows
share a state, so a short reach beside a long one does not pay for it; groups with the same reach are computed together.
Spec sparse-attention 11.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from sextant.axes.attention.base import Attention, Pattern
from sextant.axes.kv.base import KV, Heads
from sextant.axes.kv.position import ALiBi
from sextant.axes.numerics import Numerics
from sextant.core.cost import At, Cost
from sextant.core.state import JointSpec, JointState, Keys, LayerState, RowSpec, RowState
from sextant.core.stream import Stream
from sextant.kernels.attention import Reach, Scores, Span, attend

T = TypeVar("T", bound=Hashable)


class StaticPattern(Pattern):
    """Base of the patterns that choose by places. No parameters."""

    def reaches(self, kv: KV) -> tuple[Reach, ...]:
        """The reach of each of the G key/value heads that training sees."""
        raise NotImplementedError

    def build(self, width: int, kv: KV, numerics: Numerics) -> StaticAttention:
        return StaticAttention(self.reaches(kv), self.stores(kv))

    def stores(self, kv: KV) -> dict[tuple[int | None, int], list[int]]:
        """What is kept, and the groups that keep so; one latent row for all groups is kept for the longest."""
        kept = grouped([reach.kept for reach in self.reaches(kv)])
        if kv.row().heads == kv.shape[1] or len(kept) == 1:
            return kept
        windows = [window for window, _ in kept]
        longest = None if None in windows else max(window for window in windows if window)
        return {(longest, max(sinks for _, sinks in kept)): list(range(kv.shape[1]))}

    def state(self, kv: KV) -> RowSpec | JointSpec:
        stores = self.stores(kv)
        if len(stores) == 1:
            return kv.row(*next(iter(stores)))
        parts = {_part(kept): replace(kv.row(*kept), heads=len(groups)) for kept, groups in stores.items()}
        return JointSpec.of(**parts)

    def cost(self, width: int, kv: KV, at: At) -> Cost:
        """FLOPs ``2 H (K + V)`` per key read, keys averaged over the sequence (causal counting) and the groups.

        A step reads the keys that its reach names; of latents, which serve all groups at once, all that is held.
        """
        heads, groups, k_dim, v_dim = kv.shape
        reaches, row = self.reaches(kv), kv.row()
        state = self.state(kv).nbytes(at.tokens, at.itemsize)
        last = torch.tensor(at.tokens - 1)
        seen = sum(int(reach.keys(last)) for reach in reaches)
        kept = at.itemsize * (heads * (k_dim + v_dim) + groups * (k_dim + v_dim)) + 4 * heads
        return Cost(
            flops=2.0 * heads * (k_dim + v_dim) * sum(reach.mean_keys(at.tokens) for reach in reaches) / groups,
            state_bytes=state,
            read_bytes=seen * (row.k_dim + row.v_dim) * at.itemsize if row.heads == groups else state,
            activation_bytes=kept,
        )


class SpanPattern(StaticPattern):
    """A static pattern with one plain span for all groups: full attention, windows, sinks."""

    @property
    def span(self) -> Span:
        raise NotImplementedError

    def reaches(self, kv: KV) -> tuple[Reach, ...]:
        return (self.span,) * kv.shape[1]


def fading(kv: KV, field: str, first: int) -> Iterator[tuple[str, str, str]]:
    """ALiBi's penalty grows with the distance, so first tokens that all should read go dark."""
    if first and isinstance(getattr(kv, "position", None), ALiBi):
        what = f"ALiBi fades the first {first} tokens with distance"
        yield f"attention.{field}", what, f"Use rope or nope, or set {field} to 0"


def grouped(values: Sequence[T]) -> dict[T, list[int]]:
    """Each value with the indices where it stands, in order of first sight."""
    found: dict[T, list[int]] = {}
    for index, value in enumerate(values):
        found.setdefault(value, []).append(index)
    return found


def _part(kept: tuple[int | None, int]) -> str:
    """Name of a part of the state: ``all``, ``last64``, ``last64first4``."""
    window, sinks = kept
    return "all" if window is None else f"last{window}" + (f"first{sinks}" if sinks else "")


@dataclass(frozen=True)
class Reading:
    """What the groups of one reach attend with: their queries, their keys, how they score."""

    q_THK: Tensor
    keys: Keys
    reach: Reach
    scores: Scores


class StaticAttention(Attention):
    """Softmax attention, each KV group by its reach."""

    reads_state = False

    def __init__(self, reaches: Sequence[Reach], stores: dict[tuple[int | None, int], list[int]]):
        super().__init__()
        self.reaches, self.stores = tuple(reaches), stores
        self.parts = grouped(self.reaches)

    def forward(
        self, heads: Heads, x_TD: Tensor, stream: Stream, scores: Scores, state: LayerState | None
    ) -> tuple[Tensor, None]:
        held = {kept: self._held(heads, stream, kept, state) for kept in self.stores}
        if len(self.parts) == 1:
            (keys,), reach = held.values(), self.reaches[0]
            return self.attend(Reading(heads.q_THK, keys, reach, scores), stream), None
        return self._by_group(heads.q_THK, held, stream, scores), None

    def attend(self, reading: Reading, stream: Stream) -> Tensor:
        """``o_THV`` of the heads of one reach."""
        return attend(reading.q_THK, reading.keys, stream, reading.reach, reading.scores)

    def _held(
        self, heads: Heads, stream: Stream, kept: tuple[int | None, int], state: LayerState | None
    ) -> Keys:
        """The keys of the groups that keep the same rows, from the step itself or from what is remembered."""
        own, groups = Keys(heads.k_TGK, heads.v_TGV), self.stores[kept]
        keys = own
        if isinstance(state, JointState):
            k_TGK, v_TGV = (_pick(x, groups) for x in heads.rows)
            keys = state.part(_part(kept), RowState).append(k_TGK, v_TGV, stream)
        elif isinstance(state, RowState):
            keys = state.append(*heads.rows, stream)
        if keys.positions is None:
            return _of(own, groups, len(self.reaches))
        return keys if heads.multiply_out is None else heads.multiply_out(keys)

    def _by_group(
        self, q_THK: Tensor, held: dict[tuple[int | None, int], Keys], stream: Stream, scores: Scores
    ) -> Tensor:
        """Every reach by itself; heads go back to their places."""
        outputs, order = [], []
        each = q_THK.shape[1] // len(self.reaches)
        for reach, groups in self.parts.items():
            mine = [head for group in groups for head in range(group * each, (group + 1) * each)]
            kept = next(kept for kept, there in self.stores.items() if set(groups) <= set(there))
            keys = _of(held[kept], [self.stores[kept].index(group) for group in groups], len(self.stores[kept]))
            slopes_H = None if scores.slopes_H is None else scores.slopes_H[mine]
            reading = Reading(_pick(q_THK, mine), keys, reach, Scores(scores.scale, slopes_H))
            outputs.append(self.attend(reading, stream))
            order += mine
        back = [order.index(head) for head in range(len(order))]
        return _pick(torch.cat(outputs, dim=1), back)


def _of(keys: Keys, groups: list[int], of: int) -> Keys:
    """The keys of these groups; a row that all groups share stays whole."""
    if keys.k.shape[1] != of or groups == list(range(of)):
        return keys
    return replace(keys, k=_pick(keys.k, groups), v=_pick(keys.v, groups))


def _pick(x: Tensor, places: list[int]) -> Tensor:
    """These places of the second axis: a view where they follow each other."""
    first, count = places[0], len(places)
    if places == list(range(first, first + count)):
        return x.narrow(1, first, count)
    return x.index_select(1, torch.tensor(places, device=x.device))
