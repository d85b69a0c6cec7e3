"""The ragged stream: the one layout that every layer inside a model sees.

T tokens of B sequences lie end to end; ``cu_seqlens`` says where each begins. A packed row of documents, a padded
batch, a prompt, a chunk of a prompt and one decoding step are all such streams, so one ``forward`` serves them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sextant.core.state import Memory
    from sextant.core.trace import Trace


@dataclass(frozen=True)
class Stream:
    """Where each of T tokens belongs.

    Attributes:
        positions_T: int64, the position of each token in its own sequence (late in a decode, large).
        cu_seqlens: int32 [B+1], sequence ``b`` holds rows ``cu_seqlens[b]`` to ``cu_seqlens[b+1]`` of the stream.
        max_len: the longest sequence in this stream, or a bound on it.
        rows: B when all sequences have the same length, else None: lets kernels take the batched path.
        memory: decoding states that the layers read and extend; None in training.
        turns: cosine and sine of the rotary codes in use, by code, computed once for all layers of a model.
        replay: choices of these T tokens that layers take from a record instead of making them.
    """

    positions_T: Tensor
    cu_seqlens: Tensor
    max_len: int
    rows: int | None = None
    memory: Memory | None = field(default=None, compare=False)
    turns: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False)
    replay: Trace | None = field(default=None, compare=False)

    @classmethod
    def of_lengths(
        cls, lengths: Sequence[int], device: torch.device | str = "cpu", memory: Memory | None = None
    ) -> Stream:
        """A stream of sequences with these lengths, each after what ``memory`` already holds of it."""
        starts = memory.lengths if memory is not None else [0] * len(lengths)
        longest = max(lengths, default=0)
        if longest == min(lengths, default=0) == 1:  # a decoding step: called for every token
            positions = torch.tensor(starts)
        else:
            ranges = [range(start, start + length) for start, length in zip(starts, lengths, strict=True)]
            positions = torch.cat([torch.arange(r.start, r.stop) for r in ranges] or [torch.arange(0)])
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        rows = len(lengths) if len(set(lengths)) == 1 else None
        stream = cls(positions.to(device), cu_seqlens.to(device), longest, rows, memory)
        stream.__dict__["lengths"] = list(lengths)  # known here: spares the synchronisation
        return stream

    @classmethod
    def packed(cls, starts_T: Tensor, max_len: int) -> Stream:
        """A training stream from flags: ``starts_T`` is true where a sequence begins (its first token must be one)."""
        index_T = torch.arange(starts_T.numel(), device=starts_T.device)
        first_B = index_T[starts_T]
        cu_seqlens = torch.cat([first_B, index_T.new_tensor([starts_T.numel()])]).to(torch.int32)
        positions_T = index_T - first_B[starts_T.cumsum(0) - 1]
        lengths = cu_seqlens.diff()
        rows = len(lengths) if bool((lengths == lengths[:1]).all()) else None
        return cls(positions_T, cu_seqlens, max_len, rows)

    def replaying(self, trace: Trace | None) -> Stream:
        """The same tokens, with choices from a record of them."""
        stream = replace(self, replay=trace)
        if "lengths" in self.__dict__:
            stream.__dict__["lengths"] = self.lengths
        return stream

    @cached_property
    def lengths(self) -> list[int]:
        """Sequence lengths on the host; costs a device synchronisation the first time."""
        return self.cu_seqlens.diff().tolist()

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Neighbouring sequences of equal length, as (how many, length); empty ones too."""
        if self.rows:
            return [(self.rows, self.positions_T.numel() // self.rows)]
        return [(len(list(run)), length) for length, run in groupby(self.lengths)]

    @cached_property
    def sequence_T(self) -> Tensor:
        """int64: the number of the sequence that each token belongs to."""
        index_T = torch.arange(self.positions_T.numel(), device=self.positions_T.device, dtype=torch.int32)
        return torch.searchsorted(self.cu_seqlens[1:], index_T, right=True)

    @cached_property
    def lot_B(self) -> Tensor:
        """fp32: a number from [0, 1) for each sequence, drawn once: the same in all layers, recomputed ones too."""
        return torch.rand(self.cu_seqlens.numel() - 1, device=self.cu_seqlens.device)
