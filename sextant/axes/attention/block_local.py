"""Block-local attention: a token reads the tokens of its own block up to itself.

It is MoBA with ``top_k`` 1, and half of the Sparse Transformer's fixed pattern (spec sparse-attention 11, T9).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sextant.axes.attention.static import StaticPattern
from sextant.axes.kv.base import KV
from sextant.kernels.attention import Reach, Span
from sextant.kernels.attention.span import Fold, causal


class BlockLocal(StaticPattern):
    """Causal attention within blocks of ``block`` tokens, counted from the start of the sequence."""

    kind: Literal["block_local"] = "block_local"
    block: int = Field(ge=1)

    def reaches(self, kv: KV) -> tuple[Reach, ...]:
        return (Block(self.block),) * kv.shape[1]

    def clashes(self, kv: KV, context: int) -> Iterator[tuple[str, str, str]]:
        if self.block > context:
            what = f"block {self.block} exceeds the context {context}"
            yield "attention.block", what, "Use kind: full, a smaller block or a longer context"


@dataclass(frozen=True)
class Block(Reach):
    """The keys of the query's own block. A ring of one block holds them."""

    block: int

    @property
    def kept(self) -> tuple[int, int]:
        return self.block, 0

    def visible(self, q_T: Tensor, k_S: Tensor) -> Tensor:
        q, k, seen = causal(q_T, k_S)
        return seen & (q // self.block == k // self.block)

    def keys(self, t_T: Tensor) -> Tensor:
        return t_T % self.block + 1

    def fold(self, length: int) -> Fold:
        """Every block is a sequence of its own."""
        lengths = [min(self.block, length - start) for start in range(0, length, self.block)]
        return Fold(torch.arange(length), lengths, Span())

    def may_meet(self, q_first: Tensor, q_last: Tensor, k_first: Tensor, k_last: Tensor) -> Tensor:
        return (k_first <= q_last) & (q_first // self.block <= k_last // self.block)
