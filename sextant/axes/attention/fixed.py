"""The Sparse Transformer's fixed pattern (1904.10509 section 4.2): the query's own block, and the last few columns of
every block before it, whose tokens learn to sum their block up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from sextant.axes.attention.block_local import Block
from sextant.axes.attention.static import StaticPattern
from sextant.axes.attention.strided import needs_two_groups
from sextant.axes.kv.base import KV
from sextant.kernels.attention import Reach
from sextant.kernels.attention.span import causal


class Fixed(StaticPattern):
    """The own block of ``block`` tokens, and ``columns`` tokens of each past block.

    A decoding state keeps every row for the groups that read columns: a row of the open block becomes a column only
    when the block is over, and the others are not taken out of the buffers.

    Attributes:
        heads: ``split`` gives the own block to the first half of the KV groups, which keep a ring, and the columns to
            the rest, whose queries in the first block then read nothing; ``merged`` gives both to all.
        subblocks: which columns: the ``last`` of the block for all groups, or ``distinct`` ones, counted from the end.
    """

    kind: Literal["fixed"] = "fixed"
    block: int = Field(ge=1)
    columns: int = Field(default=8, ge=1)
    heads: Literal["split", "merged"] = "split"
    subblocks: Literal["last", "distinct"] = "last"

    @model_validator(mode="after")
    def _fits(self) -> Fixed:
        if self.columns > self.block:
            raise ValueError(f"columns {self.columns} exceed block {self.block}")
        return self

    def reaches(self, kv: KV) -> tuple[Reach, ...]:
        groups = kv.shape[1]
        own = -(-groups // 2) if self.heads == "split" else 0
        rest = [self._columns(index) for index in range(groups - own)]
        return (Block(self.block),) * own + tuple(rest)

    def _columns(self, index: int) -> Columns:
        back = index % (self.block // self.columns) if self.subblocks == "distinct" else 0
        return Columns(self.block, self.columns, self.block - back * self.columns, self.heads == "merged")

    def clashes(self, kv: KV, context: int) -> Iterator[tuple[str, str, str]]:
        yield from needs_two_groups(self.heads, kv)
        if self.block > context:
            what = f"block {self.block} exceeds the context {context}, so no column would ever be read"
            yield "attention.block", what, "Use kind: full, a smaller block or a longer context"


@dataclass(frozen=True)
class Columns(Reach):
    """The ``columns`` tokens of every past block that end before ``stop``, and the own block where ``own``."""

    block: int
    columns: int
    stop: int
    own: bool

    def visible(self, q_T: Tensor, k_S: Tensor) -> Tensor:
        q, k, seen = causal(q_T, k_S)
        place, same = k % self.block, q // self.block == k // self.block
        column = ~same & (place >= self.stop - self.columns) & (place < self.stop)
        return seen & (column | same if self.own else column)

    def keys(self, t_T: Tensor) -> Tensor:
        past_T = t_T // self.block * self.columns
        return past_T + t_T % self.block + 1 if self.own else past_T
