"""Rows per finished block of tokens: means, compressed keys, representatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sextant.core.state.base import LayerState, StateSpec

if TYPE_CHECKING:
    from sextant.core.state.memory import Memory


@dataclass(frozen=True)
class BlockSpec(StateSpec):
    """One row of ``shape`` for every window of ``length`` tokens that is complete, one window each ``stride`` tokens.

    Summaries of keys: MoBA's means, NSA's compressed keys, InfLLM's representatives. A row never changes once it is
    made, and a window that is not complete has none (spec sparse-attention 1.4). ``itemsize`` is fixed when given:
    summaries that are scored stay fp32 (4) beside half-precision rows.
    """

    shape: tuple[int, ...]
    length: int
    stride: int
    itemsize: int | None = 4

    def closed(self, tokens: int) -> int:
        """Complete windows among ``tokens`` tokens."""
        return max(0, (tokens - self.length) // self.stride + 1)

    def nbytes(self, tokens: int, itemsize: int) -> int:
        return self.closed(tokens) * math.prod(self.shape) * (self.itemsize or itemsize)

    def build(self, memory: Memory) -> BlockState:
        return BlockState(self, memory)


class BlockState(LayerState):
    """Summary rows ``[B, C, *shape]``, made once when their window is complete."""

    def __init__(self, spec: BlockSpec, memory: Memory):
        self.spec = spec
        wide = torch.promote_types(memory.dtype, torch.float32)
        dtype = wide if spec.itemsize == 4 else memory.dtype
        self.buffer = torch.empty(memory.batch, 0, *spec.shape, dtype=dtype, device=memory.device)
        self.held = [0] * memory.batch

    def close(self, b: int, tokens: int, make: Callable[[int, int], Tensor]) -> Tensor:
        """Rows ``[M, *shape]`` of all windows complete after ``tokens`` tokens of sequence ``b``.

        ``make(start, stop)`` gives the rows of windows ``start`` to ``stop - 1``, those that this step completes.
        """
        done, due = self.held[b], self.spec.closed(tokens)
        if due > self.buffer.shape[1]:
            room = self.buffer.new_zeros(self.buffer.shape[0], due + max(16, due // 2), *self.spec.shape)
            room[:, : self.buffer.shape[1]] = self.buffer
            self.buffer = room
        if due > done:
            self.buffer[b, done:due] = make(done, due).to(self.buffer.dtype)
            self.held[b] = due
        return self.buffer[b, :due]

    @property
    def nbytes(self) -> int:
        # fp64 rows, which only tests have, count as the fp32 that the declaration says
        itemsize = self.spec.itemsize or self.buffer.element_size()
        return sum(self.held) * math.prod(self.spec.shape) * itemsize

    def keep(self, rows_B: Tensor) -> None:
        self.buffer, self.held = self.buffer[rows_B], [self.held[b] for b in rows_B.tolist()]

    def rollback(self, counts: Sequence[int], lengths: Sequence[int]) -> None:
        self.held = [min(held, self.spec.closed(length)) for held, length in zip(self.held, lengths, strict=True)]
