"""Contract of axis 1: which keys does a query read?

A :class:`Pattern` is a declaration that says what it remembers (``state``), what it costs, and builds a module
``(heads, x_TD, stream, scores, state) -> o_THV, selection``. ``state`` is None in training; ``selection`` is what the
pattern chose to read, where it chooses. Packed sequences never see each other. A :class:`Mixer` replaces the whole
step: it has projections of its own, and its module is ``(x_TD, stream, state) -> y_TD``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from pydantic import Field
from torch import Tensor, nn

from sextant.axes.kv.base import KV, Heads
from sextant.axes.kv.position import ALiBi
from sextant.axes.numerics import Numerics
from sextant.core.cost import At, Cost
from sextant.core.errors import UsageError
from sextant.core.spec import Spec
from sextant.core.state import LayerState, RowState, StateSpec
from sextant.core.stream import Stream
from sextant.kernels.attention import Scores


class Pattern(Spec):
    """Base of the options that attend."""

    def build(self, width: int, kv: KV, numerics: Numerics) -> Attention:
        raise NotImplementedError

    def state(self, kv: KV) -> StateSpec:
        """What a layer remembers."""
        raise NotImplementedError

    def clashes(self, kv: KV, context: int) -> Iterator[tuple[str, str, str]]:
        """Why this pattern cannot work with this KV option or context: field, reason and remedy of each problem."""
        yield from ()

    def cost(self, width: int, kv: KV, at: At) -> Cost:
        """Scores, sums, choosing and state, and own parameters; q, k, v and o are the KV option's."""
        raise NotImplementedError


class SelectingPattern(Pattern):
    """Base of the patterns that choose blocks of keys by a score.

    Attributes:
        block: tokens of a block; the grid starts with each sequence.
    """

    block: int = Field(ge=1)

    def clashes(self, kv: KV, context: int) -> Iterator[tuple[str, str, str]]:
        if self.block > context:
            what = f"block {self.block} exceeds the context {context}, so nothing would ever be chosen"
            yield "attention.block", what, "Use a smaller block or a longer context"
        if isinstance(getattr(kv, "position", None), ALiBi):
            what = f"{getattr(self, 'kind', '')} cannot rank blocks by ALiBi's slopes: a summary has no distance"
            yield "kv.position", what, "Use rope or nope"


class Mixer(Spec):
    """Base of the linear mixers: a recurrence in attention's place, with a state that does not grow."""

    def build(self, width: int, numerics: Numerics) -> nn.Module:
        raise NotImplementedError

    def state(self) -> StateSpec:
        """What a layer remembers."""
        raise NotImplementedError

    def cost(self, width: int, at: At) -> Cost:
        """All of it: projections, recurrence, gates, norms, state."""
        raise NotImplementedError


@dataclass(frozen=True)
class Selection:
    """What a selecting layer chose to read.

    Attributes:
        blocks_THJ: int64 block numbers, counted from the start of each query's own sequence; -1 where fewer were
            chosen. The second axis is H, G or 1, as the choice is made.
        block: tokens of a block.
        loss: what a separate indexer learns from: its loss in nats summed over the step's query tokens, already times
            its own factor, or None. The step divides it by its tokens, as it does with balance terms.
        applied: whether attention read what was chosen; False while a gate only learns beside full attention.
    """

    blocks_THJ: Tensor
    block: int
    loss: Tensor | None = None
    applied: bool = True


class Attention(nn.Module):
    """Base of the modules that patterns build.

    ``reads_state`` says that a decoding step reads all its keys from the state, from the first step on; otherwise the
    first step may read its own rows, which spares latents from being multiplied out or absorbed.
    """

    reads_state = True

    def forward(
        self, heads: Heads, x_TD: Tensor, stream: Stream, scores: Scores, state: LayerState | None
    ) -> tuple[Tensor, Selection | None]:
        """``o_THV`` and the selection, if any."""
        raise NotImplementedError


class SelectingAttention(Attention):
    """Base of the modules that selecting patterns build: their choice can be given."""

    def forward(
        self, heads: Heads, x_TD: Tensor, stream: Stream, scores: Scores, state: LayerState | None,
        chosen_THJ: Tensor | None = None,
    ) -> tuple[Tensor, Selection | None]:
        """With ``chosen_THJ`` (:attr:`Selection.blocks_THJ` of a record) these blocks are read, in training too."""
        raise NotImplementedError


@dataclass(frozen=True)
class Sequence:
    """One sequence of a step: its T queries, and the S keys from its first token on, of which the last T are their own.

    Attributes:
        index: number of the sequence in the stream.
        here: its rows of the stream.
        chosen_THJ: blocks that a record tells its queries to read, if there is one.
    """

    index: int
    here: slice
    q_THK: Tensor
    k_SGK: Tensor
    v_SGV: Tensor
    chosen_THJ: Tensor | None = None

    @property
    def first(self) -> int:
        """Place of the first query in its sequence, so query t reads keys up to ``first + t``."""
        return len(self.k_SGK) - len(self.q_THK)

    def after(self, count: int) -> Sequence:
        """Without its first ``count`` queries."""
        chosen_THJ = None if self.chosen_THJ is None else self.chosen_THJ[count:]
        here = slice(self.here.start + count, self.here.stop)
        return replace(self, here=here, q_THK=self.q_THK[count:], chosen_THJ=chosen_THJ)

    def recorded(self, blocks_THJ: Tensor, block: int) -> Tensor:
        """The record's choice where there is one, else the choice just made.

        As many places as the latter has, or as the record needs: how a choice is read may turn on their number, so that
        a record replayed as it was made gives the same bits.

        Raises:
            UsageError: a record of another number of choosers, or of blocks that the sequence has not got.
        """
        if self.chosen_THJ is None:
            return blocks_THJ
        if self.chosen_THJ.shape[1] != blocks_THJ.shape[1]:
            got, want = (f"{chosen.shape[1]} choosers" for chosen in (self.chosen_THJ, blocks_THJ))
            raise UsageError("a record of other choices", where=f"sequence {self.index}", got=got, expected=want)
        if int(self.chosen_THJ.amax()) * block >= len(self.k_SGK):
            raise UsageError(
                "a record of blocks that the sequence has not got", where=f"sequence {self.index}",
                got=f"block {int(self.chosen_THJ.amax())}", expected=f"tokens up to {len(self.k_SGK) - 1}",
            )
        used_J = (self.chosen_THJ >= 0).flatten(0, 1).any(0).nonzero()
        places = max(blocks_THJ.shape[2], int(used_J[-1]) + 1 if len(used_J) else 0)
        return self.chosen_THJ[..., :places]


def sequences(
    heads: Heads, stream: Stream, keys: RowState | None, chosen_THJ: Tensor | None = None
) -> Iterator[Sequence]:
    """The sequences of a step that have tokens, with keys of the step itself or of a state that keeps every row."""
    ends = [0, *torch.tensor(stream.lengths).cumsum(0).tolist()]
    for b, (start, stop) in enumerate(pairwise(ends)):
        here = slice(start, stop)
        if start < stop:
            k, v = (heads.k_TGK[here], heads.v_TGV[here]) if keys is None else keys.sequence(b)
            yield Sequence(b, here, heads.q_THK[here], k, v, None if chosen_THJ is None else chosen_THJ[here])
