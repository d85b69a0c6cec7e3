"""MoBA: every query reads its own block of keys and the blocks whose mean key it likes best (2502.13189).

Scores of blocks are ``q . mean(k)``; candidates are complete blocks of the past; ``top_k`` counts the current block,
which is always read. No parameters, and no gradient through the choice: it learns because chosen keys are attended
(spec sparse-attention 1.4, 3). Options beyond that minimum are off by default: forced previous blocks (spec 2, F2),
a choice per KV group (F1b), FlashMoBA's key-conv (4), dense reading of short prefixes (12.4), dense decoding (3.3).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sextant.axes.attention.base import SelectingAttention, SelectingPattern, Selection, Sequence, sequences
from sextant.axes.attention.key_conv import KeyConv
from sextant.axes.kv import GQA
from sextant.axes.kv.base import KV, Heads
from sextant.axes.numerics import Numerics
from sextant.core.cost import At, Cost
from sextant.core.state import BlockSpec, BlockState, JointSpec, JointState, LayerState, RowSpec, RowState
from sextant.core.stream import Stream
from sextant.kernels.attention import Scores
from sextant.kernels.attention.selected import attend_selected
from sextant.kernels.attention.topk import block_means, even, past_blocks, selected_keys, top_blocks


class MoBA(SelectingPattern):
    """The current block, and the ``top_k - 1`` past blocks with the likeliest mean key.

    Attributes:
        per: who chooses: every query head, or every KV group by the sum over its heads.
        previous: this many blocks before the current one are always among the ``top_k``.
        min_len: a token reads everything before it while its sequence is not longer than this. The length that counts
            is the one up to the token itself, so a later token changes nothing and chunks agree with decoding.
        decode: ``dense`` makes a step of one token read everything, as the paper's evaluation does; steps of several
            tokens (prompts, chunks, drafts) stay sparse, so such a step and its tokens one by one differ.
        key_conv: keys that :class:`KeyConv` looks at, the own one included; None leaves keys alone.
    """

    kind: Literal["moba"] = "moba"
    top_k: int = Field(ge=1)
    per: Literal["head", "group"] = "head"
    previous: int = Field(default=0, ge=0)
    min_len: int = Field(default=0, ge=0)
    decode: Literal["sparse", "dense"] = "sparse"
    key_conv: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _fits(self) -> MoBA:
        if self.previous >= self.top_k:
            raise ValueError(f"previous {self.previous} and the current block exceed top_k {self.top_k}")
        return self

    def build(self, width: int, kv: KV, numerics: Numerics) -> MoBAAttention:
        return MoBAAttention(self, kv)

    def clashes(self, kv: KV, context: int) -> Iterator[tuple[str, str, str]]:
        yield from super().clashes(kv, context)
        if self.key_conv and not isinstance(kv, GQA):
            what = "key_conv needs each head's keys before their position code, which latents do not give"
            yield "attention.key_conv", what, "Use kv gqa or leave key_conv out"
        if self.per == "group" and kv.row().heads != kv.shape[1]:
            what = "per group would mean one choice for each head in training and one for all in decoding"
            yield "attention.per", what, "Use per: head"

    def state(self, kv: KV) -> JointSpec:
        row = kv.row()
        parts = {"keys": row, "means": BlockSpec((row.heads, row.k_dim), self.block, self.block)}
        if self.key_conv:
            parts["plain"] = RowSpec(row.heads, row.k_dim, 0, window=self.key_conv - 1)
        return JointSpec.of(**parts)

    def cost(self, width: int, kv: KV, at: At) -> Cost:
        """Reads are the expected ones when the heads of a group choose apart (spec sparse-attention 1.5)."""
        return self._cost(kv, at, self.distinct(kv, at.tokens)[0])

    def bound(self, width: int, kv: KV, at: At) -> Cost:
        """:meth:`cost` with the most that a decoding step can read: no two heads of a group agree."""
        return self._cost(kv, at, self.distinct(kv, at.tokens)[1])

    def distinct(self, kv: KV, tokens: int) -> tuple[float, int]:
        """Past blocks of one KV head that the step after ``tokens`` tokens reads: expected, and at most.

        With G heads that choose k of N blocks apart and evenly, ``N (1 - (1 - k/N)^G)`` (spec 1.5).
        """
        past = tokens // self.block
        if tokens < self.min_len or self.decode == "dense":
            return past, past
        forced = min(self.previous, past)
        free, scored = min(self.top_k - 1, past) - forced, past - forced
        choosers = 1 if self.per == "group" else kv.shape[0] // kv.row().heads
        expected = scored * (1 - (1 - free / max(1, scored)) ** choosers)
        return forced + expected, forced + min(scored, choosers * free)

    def _cost(self, kv: KV, at: At, distinct: float) -> Cost:
        heads, groups, k_dim, v_dim = kv.shape
        row, past = kv.row(), at.tokens // self.block
        scored = past_blocks(at.tokens, self.block, past) / at.tokens
        rows_read = distinct * self.block + at.tokens % self.block
        conv = self._conv_cost(kv, at)
        read = row.heads * (4 * past * row.k_dim + rows_read * (row.k_dim + row.v_dim) * at.itemsize)
        return conv + Cost(
            flops=2.0 * heads * ((k_dim + v_dim) * self._keys(at.tokens) / at.tokens + k_dim * scored),
            state_bytes=self.state(kv).nbytes(at.tokens, at.itemsize),
            read_bytes=round(read),
            activation_bytes=at.itemsize * (heads + groups) * (k_dim + v_dim) + 4 * heads,
        )

    def _conv_cost(self, kv: KV, at: At) -> Cost:
        """Taps, their products, the plain keys of the state, and what backward keeps."""
        if not self.key_conv:
            return Cost()
        row = kv.row()
        keys, earlier = row.heads * row.k_dim, min(at.tokens, self.key_conv - 1)
        taps, read = keys * self.key_conv, keys * earlier * at.itemsize
        return Cost(taps, taps, 2.0 * taps, read_bytes=read, activation_bytes=2 * keys * at.itemsize)

    def _keys(self, tokens: int) -> int:
        """Keys read by all queries of a sequence of this length, heads counted once."""
        dense = min(self.min_len, tokens)
        sparse = selected_keys(tokens, self.block, self.top_k) - selected_keys(dense, self.block, self.top_k)
        return dense * (dense + 1) // 2 + sparse


class MoBAAttention(SelectingAttention):
    """Choose, then attend to what was chosen."""

    def __init__(self, spec: MoBA, kv: KV):
        super().__init__()
        self.spec = spec
        self.key_conv = KeyConv(kv, spec.key_conv) if spec.key_conv and isinstance(kv, GQA) else None

    def forward(
        self, heads: Heads, x_TD: Tensor, stream: Stream, scores: Scores, state: LayerState | None,
        chosen_THJ: Tensor | None = None,
    ) -> tuple[Tensor, Selection]:
        keys = means = plain = None
        if isinstance(state, JointState):
            keys, means = state.part("keys", RowState), state.part("means", BlockState)
            plain = state.part("plain", RowState) if self.key_conv else None
        if self.key_conv is not None:
            heads = self.key_conv(heads, stream, plain)
        if keys is not None:
            keys.append(*heads.rows, stream)
        outputs, chosen = [heads.v_TGV.new_empty(0, heads.q_THK.shape[1], heads.v_TGV.shape[2])], []
        for own in sequences(heads, stream, keys, chosen_THJ):
            blocks_THJ = own.recorded(self._choose(own, means), self.spec.block)
            outputs.append(attend_selected(own.q_THK, own.k_SGK, own.v_SGV, blocks_THJ, self.spec.block, scores)[0])
            chosen.append(blocks_THJ)
        return torch.cat(outputs), Selection(even(chosen), self.spec.block)

    @torch.no_grad()
    def _choose(self, own: Sequence, means: BlockState | None) -> Tensor:
        def make(start: int, stop: int) -> Tensor:
            return block_means(own.k_SGK, spec.block, start, stop)

        spec, complete = self.spec, len(own.k_SGK) // self.spec.block
        means_MGK = make(0, complete) if means is None else means.close(own.index, len(own.k_SGK), make)
        dense = self._dense_until(own)
        places = max(spec.top_k, -(-min(dense, len(own.k_SGK)) // spec.block)) if own.first < dense else spec.top_k
        together = spec.per == "group"
        blocks_THJ = top_blocks(own.q_THK, means_MGK, own.first, spec.block, places, together, spec.previous)
        if places == spec.top_k:
            return blocks_THJ
        place_J = torch.arange(places, device=blocks_THJ.device)
        token_T = torch.arange(own.first, len(own.k_SGK), device=blocks_THJ.device)
        spare_TJ = (token_T[:, None] >= dense) & (place_J >= spec.top_k)
        return blocks_THJ.masked_fill(spare_TJ[:, None], -1)

    def _dense_until(self, own: Sequence) -> int:
        """Tokens before this one in the sequence read everything."""
        return len(own.k_SGK) if self.spec.decode == "dense" and len(own.q_THK) == 1 else self.spec.min_len
