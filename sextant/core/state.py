"""What a layer remembers while decoding, declared once for the budget, the simple state here, and the serving pools.

A pattern says how long rows are kept, the KV option says how wide a row is; together they are a :class:`StateSpec`.
Contract, tested for every row of the attention table: prefill = chunked prefill = decode = packed with neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sextant.core.stream import Stream


@dataclass(frozen=True)
class StateSpec:
    """Keys and values kept for one layer.

    ``window`` None keeps every token (paged when served); otherwise the last ``window`` tokens and the first ``sinks``.
    A row is ``heads`` x (``k_dim`` + ``v_dim``) elements.
    """

    heads: int
    k_dim: int
    v_dim: int
    window: int | None = None
    sinks: int = 0

    @property
    def kind(self) -> str:
        """``paged`` grows with the sequence, ``ring`` does not."""
        return "paged" if self.window is None else "ring"

    def rows(self, tokens: int) -> int:
        """Rows held, and read by one decoding step, for a sequence of this many tokens."""
        return tokens if self.window is None else min(tokens, self.window + self.sinks)

    def nbytes(self, tokens: int, itemsize: int) -> int:
        """Bytes held for one sequence of ``tokens`` tokens."""
        return self.rows(tokens) * self.heads * (self.k_dim + self.v_dim) * itemsize


@dataclass(frozen=True)
class Keys:
    """What the queries of one layer may read.

    In training ``k`` and ``v`` are the stream's own ``[S, G, K]`` and ``[S, G, V]``, and ``positions`` is None.
    From a decoding state they are buffers ``[B, G, S, K]`` and ``[B, G, S, V]`` with int64 ``positions`` ``[B, S]``
    (-1 where a slot is empty), and ``exact`` says that every slot is visible to every query of its sequence.
    """

    k: Tensor
    v: Tensor
    positions: Tensor | None = None
    exact: bool = False


class LayerState:
    """Growing buffers ``[B, G, C, K]`` and ``[B, G, C, V]`` that drop what a window no longer needs.

    Slots hold tokens in order: first the sinks, then a contiguous run. A ring keeps its run by moving it to the front
    when the buffer is full, never by writing modulo: a slot keeps one meaning until it is dropped.
    """

    def __init__(self, spec: StateSpec, batch: int, dtype: torch.dtype, device: torch.device | str = "cpu"):
        self.spec = spec
        self.k = torch.empty(batch, spec.heads, 0, spec.k_dim, dtype=dtype, device=device)
        self.v = torch.empty(batch, spec.heads, 0, spec.v_dim, dtype=dtype, device=device)
        self.held = [0] * batch  # slots in use
        self.dropped = [0] * batch  # tokens between the sinks and the run that are gone

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use, by the declaration's count."""
        row = self.spec.heads * (self.spec.k_dim + self.spec.v_dim) * self.k.element_size()
        return sum(min(held, self.spec.rows(held)) * row for held in self.held)

    def append(self, k_TGK: Tensor, v_TGV: Tensor, stream: Stream) -> Keys:
        """Store the rows of this step and return what its queries may read."""
        lengths = stream.lengths
        self._make_room(max(lengths))
        if stream.rows and len(set(self.held)) == 1:
            self._write_together(k_TGK, v_TGV, self.held[0], lengths[0])
        else:
            self._write_each(k_TGK, v_TGV, lengths)
        longest = max(self.held)
        return Keys(self.k[:, :, :longest], self.v[:, :, :longest], self._positions(longest), self._exact(stream))

    def _write_together(self, k_TGK: Tensor, v_TGV: Tensor, at: int, length: int) -> None:
        batch = len(self.held)
        self.k[:, :, at : at + length] = k_TGK.unflatten(0, (batch, length)).transpose(1, 2)
        self.v[:, :, at : at + length] = v_TGV.unflatten(0, (batch, length)).transpose(1, 2)
        self.held = [at + length] * batch

    def _write_each(self, k_TGK: Tensor, v_TGV: Tensor, lengths: Sequence[int]) -> None:
        for b, (k, v) in enumerate(zip(k_TGK.split(list(lengths)), v_TGV.split(list(lengths)), strict=True)):
            at, length = self.held[b], lengths[b]
            self.k[b, :, at : at + length] = k.transpose(0, 1)
            self.v[b, :, at : at + length] = v.transpose(0, 1)
            self.held[b] = at + length

    def _make_room(self, length: int) -> None:
        need = max(self.held) + length
        if need <= self.k.shape[2]:
            return
        self._drop_old()
        need = max(self.held) + length
        if need > self.k.shape[2]:
            spare = 256 if self.spec.window is None else self.spec.window + self.spec.sinks
            self.k, self.v = (_grown(buffer, need + max(spare, need // 2)) for buffer in (self.k, self.v))

    def _drop_old(self) -> None:
        """Move the last ``window`` rows behind the sinks; a query can never look further back again."""
        if self.spec.window is None:
            return
        for b, held in enumerate(self.held):
            gone = held - self.spec.sinks - self.spec.window
            if gone > 0:
                first = self.spec.sinks + gone
                for buffer in (self.k, self.v):
                    buffer[b, :, self.spec.sinks : held - gone] = buffer[b, :, first:held].clone()
                self.held[b] -= gone
                self.dropped[b] += gone

    def _exact(self, stream: Stream) -> bool:
        """One new token per sequence, equal fill, nothing outside the window: no mask is needed."""
        fits = self.spec.window is None or self.held[0] <= self.spec.window + self.spec.sinks
        return stream.max_len == 1 and len(set(self.held)) == 1 and fits

    def _positions(self, longest: int) -> Tensor:
        slot_S = torch.arange(longest, device=self.k.device)
        held_B1 = torch.tensor(self.held, device=self.k.device)[:, None]
        dropped_B1 = torch.tensor(self.dropped, device=self.k.device)[:, None]
        positions_BS = torch.where(slot_S < self.spec.sinks, slot_S, slot_S + dropped_B1)
        return torch.where(slot_S < held_B1, positions_BS, -1)


def _grown(buffer: Tensor, capacity: int) -> Tensor:
    grown = buffer.new_empty(*buffer.shape[:2], capacity, buffer.shape[3])
    grown[:, :, : buffer.shape[2]] = buffer
    return grown


class Memory:
    """The states of all layers for B sequences, and how many tokens each sequence has so far."""

    def __init__(self, specs: Sequence[StateSpec], batch: int, dtype: torch.dtype, device: torch.device | str = "cpu"):
        self.layers = [LayerState(spec, batch, dtype, device) for spec in specs]
        self.lengths = [0] * batch

    def commit(self, stream: Stream) -> None:
        """Count the tokens of a finished step."""
        self.lengths = [length + new for length, new in zip(self.lengths, stream.lengths, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows in use."""
        return sum(layer.nbytes for layer in self.layers)
