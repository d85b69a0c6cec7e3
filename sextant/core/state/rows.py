"""Rows per token, all of them or as a ring: keys and values, latents, index keys."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sextant.core.state.base import LayerState, StateSpec, too_far
from sextant.core.stream import Stream

if TYPE_CHECKING:
    from sextant.core.state.memory import Memory


@dataclass(frozen=True)
class RowSpec(StateSpec):
    """Rows per token: keys and values, latents, index keys.

    ``window`` None keeps every token (paged when served); otherwise the last ``window`` tokens and the first ``sinks``.
    A row is ``heads`` x (``k_dim`` + ``v_dim``) elements. With ``v_dim`` 0 the values are the first ``shared`` channels
    of the key (MLA's latents), and nothing more is kept for them.
    """

    heads: int
    k_dim: int
    v_dim: int
    window: int | None = None
    sinks: int = 0
    shared: int = 0

    @property
    def kind(self) -> str:
        """``paged`` grows with the sequence, ``ring`` does not."""
        return "paged" if self.window is None else "ring"

    def rows(self, tokens: int) -> int:
        """Rows held, and read by one decoding step, for a sequence of this many tokens."""
        return tokens if self.window is None else min(tokens, self.window + self.sinks)

    def nbytes(self, tokens: int, itemsize: int) -> int:
        return self.rows(tokens) * self.heads * (self.k_dim + self.v_dim) * itemsize

    def build(self, memory: Memory) -> RowState:
        return RowState(self, memory.slots_of(self.window, self.sinks), memory.batch, memory.dtype, memory.device)


@dataclass(frozen=True)
class Keys:
    """What the queries of one layer may read.

    In training, and in the first step of a decoding state, ``k`` and ``v`` are the stream's own ``[S, G, K]`` and
    ``[S, G, V]``, and ``positions`` is None. Later they are buffers ``[B, G, S, K]`` and ``[B, G, S, V]`` with int64
    ``positions`` ``[B, S]`` (-1 where a slot is empty), and ``exact`` says that every slot is visible to every query of
    its sequence. ``notes`` holds what the layers of one step share, such as a mask, by what it depends on.
    """

    k: Tensor
    v: Tensor
    positions: Tensor | None = None
    exact: bool = False
    notes: dict[Hashable, Tensor] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Fill:
    """What one step does to the slots: the same for all layers with one window and one number of sinks.

    Attributes:
        gone: old rows that each sequence drops first, from behind the sinks.
        at: slot of each sequence's first new row.
        lengths: new rows of each sequence.
        held: slots in use afterwards.
        capacity: slots that the buffers must have.
        first: the step fills empty buffers.
        view: slots that the step's queries may read.
        positions: int64 ``[B, view]``.
        exact: see :class:`Keys`.
        notes: see :class:`Keys`.
    """

    gone: list[int]
    at: list[int]
    lengths: list[int]
    held: list[int]
    capacity: int
    first: bool
    view: slice
    positions: Tensor
    exact: bool
    notes: dict[Hashable, Tensor] = field(default_factory=dict)

    @cached_property
    def together(self) -> bool:
        """All sequences write the same slots."""
        return len(set(self.at)) == 1 and len(set(self.lengths)) == 1

    @cached_property
    def at_B(self) -> Tensor:
        """``at`` on the device."""
        return torch.tensor(self.at, device=self.positions.device)

    @cached_property
    def sequence_B(self) -> Tensor:
        """Numbers of the sequences, on the device."""
        return torch.arange(len(self.at), device=self.positions.device)


class Slots:
    """Which token lies in which slot, counted once for all layers with one window and one number of sinks.

    Slots hold tokens in order: first the sinks, then a contiguous run. A ring keeps its run by moving it to the front
    when W spare slots are used up, never by writing modulo: a slot keeps one meaning until it is dropped.
    """

    def __init__(
        self, window: int | None, sinks: int, batch: int, device: torch.device | str = "cpu", undo: int = 0
    ):
        self.window, self.sinks, self.device, self.undo = window, sinks, device, undo
        self.held = [0] * batch  # slots in use
        self.dropped = [0] * batch  # tokens between the sinks and the run that are gone
        self.capacity = 0
        self.fills: list[Fill] = []  # the last step's, if any
        self.steps = 0

    def step(self, number: int, stream: Stream) -> Fill:
        """The slots of step ``number``: the first layer that asks moves on to it, the others find it done."""
        if number == self.steps:
            self.fills = [self._advance(stream)]
            self.steps += 1
        return self.fills[0]

    def _advance(self, stream: Stream) -> Fill:
        lengths, first = stream.lengths, not any(self.held)
        gone = self._drop(max(lengths, default=0))
        at, self.held = self.held, [held + length for held, length in zip(self.held, lengths, strict=True)]
        longest = max(self.held, default=0)
        if longest > self.capacity or any(gone):  # a long chunk's room is given back with what it brought
            self.capacity = self._roomy(longest)
        equal = len(set(self.held)) == 1
        single = equal and stream.max_len == 1 and stream.rows is not None
        # The last W slots are all that one new token per sequence sees, unless sinks lie apart from them.
        start = longest - self.window if single and self.window and not self.sinks and longest > self.window else 0
        exact = single and (self.window is None or longest - start <= self.window + self.sinks)
        return Fill(
            gone, at, lengths, self.held, self.capacity, first, slice(start, longest),
            self._positions(start, longest), exact,
        )

    def _drop(self, length: int) -> list[int]:
        """Rows to drop before ``length`` more: all that lie outside the window, once its spare room is used up."""
        if self.window is None or max(self.held, default=0) + length <= self.sinks + 2 * self.window + self.undo:
            return [0] * len(self.held)
        gone = [max(0, held - self.sinks - self.window - self.undo) for held in self.held]
        self.held = [held - n for held, n in zip(self.held, gone, strict=True)]
        self.dropped = [dropped + n for dropped, n in zip(self.dropped, gone, strict=True)]
        return gone

    def _roomy(self, need: int) -> int:
        if self.window is None:
            return need + max(256, need // 2)
        return max(need, self.sinks + 2 * self.window + self.undo)

    def rollback(self, counts: Sequence[int]) -> None:
        """Forget the last ``counts[b]`` tokens of each sequence; rows that the window then needs must still be here."""
        self.held = [held - count for held, count in zip(self.held, counts, strict=True)]
        for held, dropped in zip(self.held, self.dropped, strict=True):
            if dropped and held < self.sinks + (self.window or 0):
                raise too_far(max(counts), self.undo)

    def _positions(self, start: int, stop: int) -> Tensor:
        slot_S = torch.arange(start, stop, device=self.device)
        held_B1 = torch.tensor(self.held, device=self.device)[:, None]
        positions_BS = slot_S.expand(len(self.held), -1)
        if any(self.dropped):
            dropped_B1 = torch.tensor(self.dropped, device=self.device)[:, None]
            positions_BS = torch.where(slot_S < self.sinks, slot_S, slot_S + dropped_B1)
        return torch.where(slot_S < held_B1, positions_BS, -1)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only."""
        self.held, self.dropped = [self.held[b] for b in rows], [self.dropped[b] for b in rows]


class RowState(LayerState):
    """Growing buffers ``[B, G, C, K]`` and ``[B, G, C, V]`` that drop what a window no longer needs.

    Free slots hold finite numbers: a mask adds minus infinity to their scores, which would not hide a NaN.
    """

    def __init__(self, spec: RowSpec, slots: Slots, batch: int, dtype: torch.dtype, device: torch.device | str):
        self.spec, self.slots = spec, slots
        self.k = torch.empty(batch, spec.heads, 0, spec.k_dim, dtype=dtype, device=device)
        self.v = torch.empty(batch, spec.heads, 0, spec.v_dim, dtype=dtype, device=device)
        self.steps = 0

    @property
    def held(self) -> list[int]:
        """Slots in use, of each sequence."""
        return self.slots.held

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use, by the declaration's count."""
        row = self.spec.heads * (self.spec.k_dim + self.spec.v_dim) * self.k.element_size()
        return sum(self.spec.rows(held) * row for held in self.held)

    def append(self, k_TGK: Tensor, v_TGV: Tensor, stream: Stream) -> Keys:
        """Store the rows of this step and return what its queries may read."""
        fill = self.slots.step(self.steps, stream)
        self.steps += 1
        if any(fill.gone):
            self.k, self.v = (_moved(buffer, self.spec.sinks, fill) for buffer in (self.k, self.v))
        elif fill.capacity > self.k.shape[2]:
            self.k, self.v = (_grown(buffer, fill.capacity) for buffer in (self.k, self.v))
        _write(self.k, k_TGK, fill)
        _write(self.v, v_TGV[..., : self.spec.v_dim], fill)
        if fill.first:
            return Keys(k_TGK, v_TGV)
        k_BGSK = self.k[:, :, fill.view]
        v_BGSV = self.v[:, :, fill.view] if self.spec.v_dim else k_BGSK[..., : self.spec.shared]
        return Keys(k_BGSK, v_BGSV, fill.positions, fill.exact, fill.notes)

    def sequence(self, b: int) -> tuple[Tensor, Tensor]:
        """``k_SGK`` and ``v_SGV`` of the tokens held of sequence ``b``, in order; of a ring, sinks first."""
        k_SGK = self.k[b, :, : self.held[b]].transpose(0, 1)
        v_SGV = self.v[b, :, : self.held[b]].transpose(0, 1) if self.spec.v_dim else k_SGK[..., : self.spec.shared]
        return k_SGK, v_SGV

    def keep(self, rows_B: Tensor) -> None:
        """The slots are told apart, by the memory."""
        self.k, self.v = self.k[rows_B], self.v[rows_B]

    def rollback(self, counts: Sequence[int], lengths: Sequence[int]) -> None:
        """Nothing to do: which rows are in use is the slots' affair."""


def _write(buffer_BGCK: Tensor, rows_TGK: Tensor, fill: Fill) -> None:
    if fill.together:
        at, length = fill.at[0], fill.lengths[0]
        new = rows_TGK.unflatten(0, (len(fill.at), length)).transpose(1, 2)
        buffer_BGCK[:, :, at : at + length] = new
    elif max(fill.lengths) == 1 == min(fill.lengths):
        buffer_BGCK[fill.sequence_B, :, fill.at_B] = rows_TGK
    else:
        for b, new in enumerate(rows_TGK.split(fill.lengths)):
            buffer_BGCK[b, :, fill.at[b] : fill.at[b] + fill.lengths[b]] = new.transpose(0, 1)


def _moved(buffer_BGCK: Tensor, sinks: int, fill: Fill) -> Tensor:
    """The run of each sequence moved to the front, in fresh memory, because source and target may overlap."""
    moved = buffer_BGCK.new_zeros(*buffer_BGCK.shape[:2], fill.capacity, buffer_BGCK.shape[3])
    if len(set(fill.gone)) == 1:
        moved[:, :, :sinks] = buffer_BGCK[:, :, :sinks]
        stop = max(fill.at)
        moved[:, :, sinks:stop] = buffer_BGCK[:, :, sinks + fill.gone[0] : stop + fill.gone[0]]
        return moved
    for b, (gone, stop) in enumerate(zip(fill.gone, fill.at, strict=True)):
        first = min(sinks, stop)
        moved[b, :, :first] = buffer_BGCK[b, :, :first]
        moved[b, :, first:stop] = buffer_BGCK[b, :, first + gone : stop + gone]
    return moved


def _grown(buffer: Tensor, capacity: int) -> Tensor:
    grown = buffer.new_zeros(*buffer.shape[:2], capacity, buffer.shape[3])
    grown[:, :, : buffer.shape[2]] = buffer
    return grown
