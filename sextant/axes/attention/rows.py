"""Queries that choose as one, and rows before their position code: what SeerAttention and InfLLM share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sextant.axes.attention.base import Sequence


@dataclass(frozen=True)
class Rows:
    """The queries of one sequence of a step, by those that choose as one; the grid starts with the sequence.

    Attributes:
        row_T: number of the row that each query belongs to.
        place_N: place of each row's first token in the sequence.
        block_N: block of each row, and so the number of complete blocks before it.
        last: block of the newest token.
    """

    row_T: Tensor
    place_N: Tensor
    block_N: Tensor
    last: int

    @classmethod
    def of(cls, own: Sequence, size: int, block: int) -> Rows:
        place_T = torch.arange(own.first, len(own.k_SGK), device=own.k_SGK.device)
        row_T = place_T // size - own.first // size
        place_N = torch.arange(own.first // size, (len(own.k_SGK) - 1) // size + 1, device=row_T.device) * size
        return cls(row_T, place_N, place_N // block, (len(own.k_SGK) - 1) // block)

    @property
    def count_N(self) -> Tensor:
        """Queries of each row."""
        return torch.bincount(self.row_T)

    def mean(self, x_THK: Tensor) -> Tensor:
        """``[N, H, K]``, over the queries of each row."""
        sums_NHK = x_THK.new_zeros(len(self.place_N), *x_THK.shape[1:]).index_add(0, self.row_T, x_THK)
        return sums_NHK / self.count_N[:, None, None]

    def largest(self, x_THM: Tensor) -> Tensor:
        """``[N, H, M]``, over the queries of each row; x is not negative."""
        peaks_NHM = x_THM.new_zeros(len(self.place_N), *x_THM.shape[1:])
        return peaks_NHM.scatter_reduce(0, self.row_T[:, None, None].expand_as(x_THM), x_THM, "amax")

    def past(self, blocks: int) -> Tensor:
        """bool ``[N, 1, M]``: the candidates among so many complete blocks."""
        return (torch.arange(blocks, device=self.block_N.device) < self.block_N[:, None])[:, None]


def uncoded(rows_THK: Tensor | None) -> Tensor:
    """Queries or keys before their position code; patterns that need them refuse KV options that have none."""
    if rows_THK is None:
        raise ValueError("this KV option gives no rows before their position code")
    return rows_THK
