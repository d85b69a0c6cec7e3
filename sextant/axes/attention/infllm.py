"""InfLLM: a model reads far beyond its training length by a window, sinks and a memory of blocks (2402.04617; spec
sparse-attention 6). Nothing is trained.

A query at place p reads three disjoint parts, merged by log-sum-exp:

* near: the last ``window`` keys, under the model's position code;
* far: of the keys before them the sinks, the ``top_k`` blocks that it likes best, and the blocks that are not finished,
  all at one distance: the query turned by the angle of ``window``, the keys not turned at all, so that no distance goes
  beyond what the model has seen.

A finished block is represented by the mean of its ``representatives`` most attended keys, for each query head. What a
key receives counts while it is in the window, by the softmax over the window alone: it then depends on nothing that was
chosen, so a prompt, its chunks and its tokens one by one agree. It is kept as one running sum per key and head, undone
by folding the tokens that stay again, never by subtraction; a key that has left the window gains nothing, so the sums
of a block are final when its last key leaves.

Beside its source: blocks are counted from the first token, so that sinks are whole blocks, and attention received is
weighed by the window's softmax, not by that of all parts. While training, the layer is full attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from sextant.axes.attention.base import SelectingAttention, SelectingPattern, Selection, Sequence, sequences
from sextant.axes.attention.rows import Rows, uncoded
from sextant.axes.kv import GQA
from sextant.axes.kv.base import KV, Heads
from sextant.axes.kv.position import turned
from sextant.axes.numerics import Numerics
from sextant.core.cost import At, Cost
from sextant.core.state import (
    BlockSpec,
    BlockState,
    JointSpec,
    JointState,
    Keys,
    LayerState,
    Memory,
    RecurrentSpec,
    RecurrentState,
    RowSpec,
    RowState,
)
from sextant.core.stream import Stream
from sextant.kernels.attention import Scores, Span, attend
from sextant.kernels.attention.selected import attend_selected
from sextant.kernels.attention.topk import even

CHUNK = 256
"""Queries whose attention to their window exists at once."""


class InfLLM(SelectingPattern):
    """A window, sinks, and the far blocks that a query likes best.

    Attributes:
        sinks: first tokens that every query reads, whole blocks of them.
        window: near keys, the query's own included.
        top_k: far blocks chosen, sinks and unfinished blocks not counted.
        representatives: most attended keys of a block whose mean stands for it.
        per: one choice for all heads by the sum of their scores, as published, or one per head.
        exec_block: neighbouring queries that choose by their mean, counted from the sequence's first token. Beyond 1 a
            choice depends on later tokens of these (as published, with 512): good for prompts, not causal.
    """

    kind: Literal["infllm"] = "infllm"
    sinks: int = Field(ge=0)
    window: int = Field(ge=1)
    top_k: int = Field(ge=1)
    representatives: int = Field(default=4, ge=1)
    per: Literal["all", "head"] = "all"
    exec_block: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> InfLLM:
        if self.sinks % self.block:
            raise ValueError(f"sinks {self.sinks} must be whole blocks of {self.block}")
        if self.representatives > self.block:
            raise ValueError(f"representatives {self.representatives} exceed the block of {self.block}")
        if self.exec_block > self.window:
            raise ValueError(f"exec_block {self.exec_block} exceeds the window of {self.window}")
        return self

    def build(self, width: int, kv: KV, numerics: Numerics) -> InfLLMAttention:
        return InfLLMAttention(self, kv)

    def clashes(self, kv: KV, context: int) -> Iterator[tuple[str, str, str]]:
        yield from super().clashes(kv, context)
        if not isinstance(kv, GQA):
            what = "infllm puts far keys at one distance: it needs them before their position code, not latents"
            yield "kv", what, "Use kv gqa"

    def notes(self, kv: KV) -> JointSpec:
        """What it remembers beside keys and values."""
        heads, _, k_dim, _ = kv.shape
        return JointSpec.of(
            received=RecurrentSpec((self.window + self.block, heads)),
            memory=BlockSpec((heads, k_dim), self.window + self.block, self.block),
        )

    def state(self, kv: KV) -> JointSpec:
        """All keys before their position code, and those of the window under it."""
        row = kv.row()
        near = RowSpec(row.heads, row.k_dim, 0, window=self.window)
        return JointSpec.of(keys=row, near=near, notes=self.notes(kv))

    def cost(self, width: int, kv: KV, at: At) -> Cost:
        """With ``exec_block`` 1 but for the scoring; reads are the expected ones when heads choose apart."""
        heads, groups, k_dim, v_dim = kv.shape
        far, candidates = self._mean_far(at.tokens)
        closed = BlockSpec((heads, k_dim), self.window + self.block, self.block).closed(at.tokens)
        free = max(0, closed - self.sinks // self.block)
        apart = heads // groups if self.per == "head" else 1
        chosen = free * (1 - (1 - min(self.top_k, free) / max(1, free)) ** apart)
        rest = max(0, at.tokens - self.window)
        far_rows = min(rest, self.sinks + chosen * self.block + rest % self.block)
        near_rows = min(at.tokens, self.window)
        near_keys = Span(self.window).mean_keys(at.tokens)
        return Cost(
            flops=2.0 * heads * ((k_dim + v_dim) * (near_keys + far) + k_dim * candidates / self.exec_block),
            state_bytes=self.state(kv).nbytes(at.tokens, at.itemsize),
            read_bytes=round(
                (near_rows + far_rows) * groups * (k_dim + v_dim) * at.itemsize
                + 4 * heads * (closed * k_dim + self.window + self.block)
            ),
            activation_bytes=at.itemsize * (heads + groups) * (k_dim + v_dim) + 4 * heads,
        )

    def _mean_far(self, tokens: int) -> tuple[float, float]:
        """Far keys that a query reads, and blocks it scores, averaged over a sequence."""
        blocks, rest = divmod(max(0, tokens - self.window), self.block)
        read = scored = 0
        for past, size in enumerate([self.block] * blocks + [rest]):
            free = max(0, past - self.sinks // self.block)
            before = past * self.block - (free - min(self.top_k, free)) * self.block
            read += size * before + size * (size + 1) // 2
            scored += size * free
        return read / tokens, scored / tokens


@dataclass(frozen=True)
class Near:
    """The window of some neighbouring queries.

    Attributes:
        o_THV, lse_HT: their attention over it, in fp32 or fp64.
        given_THW: the weight that each query gave to the key ``W - 1 - w`` before it; 0 before the sequence.
    """

    o_THV: Tensor
    lse_HT: Tensor
    given_THW: Tensor


class InfLLMAttention(SelectingAttention):
    """Near and far, merged; full attention while training, unless a record says what to read."""

    def __init__(self, spec: InfLLM, kv: KV):
        super().__init__()
        self.spec, self.notes = spec, spec.notes(kv)
        if isinstance(kv, GQA):
            self.position = kv.position.build(kv.heads, kv.head_dim)

    def forward(
        self, heads: Heads, x_TD: Tensor, stream: Stream, scores: Scores, state: LayerState | None,
        chosen_THJ: Tensor | None = None,
    ) -> tuple[Tensor, Selection | None]:
        if self.training and state is None and chosen_THJ is None:
            return attend(heads.q_THK, Keys(heads.k_TGK, heads.v_TGV), stream, Span(), scores), None
        plain = replace(heads, k_TGK=uncoded(heads.plain_k_TGK).to(heads.v_TGV.dtype))
        keys = near = None
        if isinstance(state, JointState):
            keys, near = state.part("keys", RowState), state.part("near", RowState)
            notes = state.part("notes", JointState)
            keys.append(plain.k_TGK, heads.v_TGV, stream)
            near.append(heads.k_TGK, heads.v_TGV, stream)
        else:
            notes = self._fresh(heads, stream)
        outputs, chosen = [heads.v_TGV.new_empty(0, heads.q_THK.shape[1], heads.v_TGV.shape[2])], []
        for own in sequences(plain, stream, keys, chosen_THJ):
            near_SGK = heads.k_TGK[own.here] if near is None else near.sequence(own.index)[0]
            o_THV, lse_HT = self._near(own, near_SGK, scores, notes)
            q_THK = self._far_queries(uncoded(heads.plain_q_THK)[own.here], own)
            blocks_THJ = self._choose(own, q_THK, notes.part("memory", BlockState))
            blocks_THJ = own.recorded(blocks_THJ, self.spec.block)
            outputs.append(self._with_far(own, q_THK, blocks_THJ, scores, o_THV, lse_HT).to(heads.v_TGV.dtype))
            chosen.append(blocks_THJ)
        return torch.cat(outputs), Selection(even(chosen), self.spec.block)

    def _fresh(self, heads: Heads, stream: Stream) -> JointState:
        """Notes for one forward over whole sequences."""
        memory = Memory([self.notes], len(stream.lengths), heads.v_TGV.dtype, heads.v_TGV.device)
        return self.notes.build(memory)

    def _near(self, own: Sequence, near_SGK: Tensor, scores: Scores, notes: JointState) -> tuple[Tensor, Tensor]:
        """Attention over the window; on the way, what keys receive, and the blocks that are finished by it."""
        received, memory = notes.part("received", RecurrentState), notes.part("memory", BlockState)
        outputs, sums = [], []
        for at in range(0, len(own.q_THK), CHUNK):
            near = self._window(own, near_SGK, at, scores)
            totals_SH = _add_given(received.now[own.index], near.given_THW)
            tokens = own.first + at + len(near.o_THV)
            memory.close(own.index, tokens, _Maker(self.spec, own.k_SGK, totals_SH, tokens))
            received.advance(own.index, totals_SH[-len(received.now[own.index]) :], (near.given_THW,), _fold)
            outputs.append(near.o_THV)
            sums.append(near.lse_HT)
        return torch.cat(outputs), torch.cat(sums, dim=1)

    def _window(self, own: Sequence, near_SGK: Tensor, at: int, scores: Scores) -> Near:
        """``CHUNK`` queries, from query ``at`` on, over the keys from ``window - 1`` before the first of them."""
        q_THK, window = own.q_THK[at : at + CHUNK], self.spec.window
        after = len(own.q_THK) - at - len(q_THK)  # keys of the step behind these queries
        held = window - 1 + len(q_THK)
        k_SGK, v_SGV = (_last(rows, held, after, q_THK.dtype) for rows in (near_SGK, own.v_SGV))
        q_TGNK = q_THK.to(k_SGK.dtype).unflatten(1, (k_SGK.shape[1], -1))
        scores_HTS = torch.einsum("tgnk,sgk->gnts", q_TGNK, k_SGK).flatten(0, 1) * scores.scale
        query_T1 = torch.arange(len(q_THK), device=q_THK.device)[:, None]
        key_S = torch.arange(held, device=q_THK.device)
        real_S = key_S >= window - 1 - own.first - at
        visible_TS = (key_S >= query_T1) & (key_S < query_T1 + window) & real_S
        scores_HTS = scores_HTS.masked_fill(~visible_TS, -math.inf)
        lse_HT = scores_HTS.logsumexp(-1)
        weights_HTS = (scores_HTS - lse_HT[..., None]).exp()
        o_TGNV = torch.einsum("gnts,sgv->tgnv", weights_HTS.unflatten(0, (k_SGK.shape[1], -1)), v_SGV)
        place_TW = query_T1 + torch.arange(window, device=q_THK.device)
        given_HTW = weights_HTS.detach().gather(2, place_TW.expand(len(weights_HTS), -1, -1))
        return Near(o_TGNV.flatten(1, 2), lse_HT, given_HTW.transpose(0, 1))

    def _far_queries(self, plain_THK: Tensor, own: Sequence) -> Tensor:
        """Turned by the angle of ``window``. Far keys are not turned, so a code's magnitude is taken twice here."""
        place_T = torch.full((len(plain_THK),), self.spec.window, device=plain_THK.device)
        turned_THK = turned(self.position, plain_THK, place_T) * getattr(self.position, "magnitude", 1.0)
        return turned_THK.to(own.q_THK.dtype)

    @torch.no_grad()
    def _choose(self, own: Sequence, q_THK: Tensor, memory: BlockState) -> Tensor:
        """int64 ``[T, H or 1, J]``: chosen blocks from the best on, sinks, unfinished blocks; -1 for none."""
        spec = self.spec
        memory_MHK = memory.close(own.index, len(own.k_SGK), _nothing_new)
        rows = Rows.of(own, spec.exec_block, spec.block)
        scores_NHM = torch.einsum("nhk,mhk->nhm", rows.mean(q_THK.to(memory_MHK.dtype)), memory_MHK)
        scores_NHM = scores_NHM.sum(1, keepdim=True) if spec.per == "all" else scores_NHM
        finished_N = (rows.place_N - spec.window).clamp(min=0) // spec.block
        block_M = torch.arange(len(memory_MHK), device=q_THK.device)
        free_NM = (block_M >= spec.sinks // spec.block) & (block_M < finished_N[:, None])
        scores_NHM = scores_NHM.masked_fill(~free_NM[:, None], -math.inf)
        best_NHM, order_NHM = scores_NHM.sort(dim=-1, descending=True, stable=True)
        chosen_NHJ = order_NHM.masked_fill(best_NHM == -math.inf, -1)[..., : spec.top_k]
        always_TJ = self._always(own, finished_N[rows.row_T])
        return torch.cat([chosen_NHJ[rows.row_T], always_TJ[:, None].expand(-1, scores_NHM.shape[1], -1)], dim=-1)

    def _always(self, own: Sequence, finished_T: Tensor) -> Tensor:
        """int64 ``[T, J]``: sinks, and from ``finished_T`` on the blocks up to the newest far key; -1 for none."""
        spec, device = self.spec, finished_T.device
        newest_T = (torch.arange(own.first, len(own.k_SGK), device=device) - spec.window) // spec.block
        sink_J = torch.arange(spec.sinks // spec.block, device=device)
        open_J = torch.arange((spec.exec_block - 1) // spec.block + 2, device=device)
        open_TJ = finished_T.clamp(min=len(sink_J))[:, None] + open_J
        always_TJ = torch.cat([sink_J.expand(len(open_TJ), -1), open_TJ], dim=1)
        return always_TJ.masked_fill(always_TJ > newest_T[:, None], -1)

    def _with_far(
        self, own: Sequence, q_THK: Tensor, blocks_THJ: Tensor, scores: Scores, o_THV: Tensor, lse_HT: Tensor
    ) -> Tensor:
        """The near part merged with the far one, for the queries that have keys before their window."""
        alone, far = max(0, self.spec.window - own.first), len(own.k_SGK) - self.spec.window
        if alone >= len(q_THK):
            return o_THV
        # A query sees far keys as one that stands ``window`` tokens earlier sees all of its own.
        far_THV, far_HT = attend_selected(
            q_THK[alone:], own.k_SGK[:far], own.v_SGV[:far], blocks_THJ[alone:], self.spec.block, scores
        )
        near_HT = lse_HT[:, alone:]
        whole_HT = torch.logaddexp(near_HT, far_HT)
        near_TH1, far_TH1 = ((part_HT - whole_HT).exp().t()[..., None] for part_HT in (near_HT, far_HT))
        return torch.cat([o_THV[:alone], near_TH1 * o_THV[alone:] + far_TH1 * far_THV])


@dataclass(frozen=True)
class _Maker:
    """Representatives of blocks that a step finishes: called by the state that keeps them."""

    spec: InfLLM
    plain_SGK: Tensor
    totals_SH: Tensor
    tokens: int

    @torch.no_grad()
    def __call__(self, start: int, stop: int) -> Tensor:
        """``[M, H, K]`` in fp32 or fp64."""
        block = self.spec.block
        ahead = self.tokens - len(self.totals_SH)
        first, last = start * block, stop * block
        received_MSH = self.totals_SH[first - ahead : last - ahead].unflatten(0, (-1, block))
        best_MSH = received_MSH.sort(dim=1, descending=True, stable=True).indices[:, : self.spec.representatives]
        copies = received_MSH.shape[2] // self.plain_SGK.shape[1]
        keys_MSHK = self.plain_SGK[first:last].unflatten(0, (-1, block)).repeat_interleave(copies, dim=2)
        picked_MSHK = keys_MSHK.gather(1, best_MSH[..., None].expand(-1, -1, -1, keys_MSHK.shape[3]))
        return picked_MSHK.mean(1, dtype=self.totals_SH.dtype)


def _nothing_new(start: int, stop: int) -> Tensor:
    raise RuntimeError(f"blocks {start} to {stop - 1} were to be finished while their window was read")


def _add_given(received_SH: Tensor, given_THW: Tensor) -> Tensor:
    """Sums of the keys so far with those of T more, and what the T queries give: ``[S + T, H]``, newest last."""
    tokens, heads, window = given_THW.shape
    totals_SH = F.pad(received_SH, (0, 0, 0, tokens))
    first = len(received_SH) - window + 1
    token_T, near_W = (torch.arange(count, device=given_THW.device) for count in (tokens, window))
    key_TW = first + token_T[:, None] + near_W
    given_NH = given_THW.transpose(1, 2).reshape(-1, heads).to(totals_SH.dtype)
    return totals_SH.index_add_(0, key_TW.flatten(), given_NH)


def _fold(received_SH: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
    """The running sums after the tokens of ``rows``, whose keys push the oldest ones out."""
    return _add_given(received_SH, rows[0])[-len(received_SH) :]


def _last(rows_SGK: Tensor, count: int, after: int, dtype: torch.dtype) -> Tensor:
    """The ``count`` rows that end ``after`` rows before the end, zeros before the first; fp32, or fp64 for fp64."""
    stop = len(rows_SGK) - after
    wide = rows_SGK[max(0, stop - count) : stop].to(torch.promote_types(dtype, torch.float32))
    return F.pad(wide, (0, 0, 0, 0, count - len(wide), 0))
