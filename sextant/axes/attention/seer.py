"""SeerAttention: a small gate beside each layer says which blocks of keys are worth reading, and learns it from full
attention, not from the language loss (2410.13276; SeerAttention-R 2506.08889; spec sparse-attention 8).

The gate sees queries and keys before their position code. Of every complete block it keeps one projected row of
``[max, min, mean]`` of the keys; a query (or the mean of a block of queries) scores these rows; a rule turns scores
into blocks. While training, the layer reads everything, and ``Selection.loss`` is the KL divergence from the block
maxima of full attention to the gate; in evaluation and decoding the layer reads what the gate chose.

Ours, where the sources differ or leave it open: only complete past blocks are candidates, for the gate's softmax and
for its target alike, and the block of the query is always read, so that the choice is the same in a prompt, in chunks
and in decoding; a row is turned by the place of its first token, in tokens; everything in the gate is fp32.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sextant.axes.attention.base import SelectingAttention, SelectingPattern, Selection, Sequence, sequences
from sextant.axes.attention.rows import Rows, uncoded
from sextant.axes.kv import GQA
from sextant.axes.kv.base import KV, Heads
from sextant.axes.kv.position import RoPE, turned
from sextant.axes.numerics import Numerics
from sextant.axes.stability import AnyNorm, Role
from sextant.core.cost import At, Cost
from sextant.core.spec import Spec
from sextant.core.state import BlockSpec, BlockState, JointSpec, JointState, Keys, LayerState, RowSpec, RowState
from sextant.core.stream import Stream
from sextant.kernels.attention import Scores, Span, attend
from sextant.kernels.attention.selected import attend_selected
from sextant.kernels.attention.topk import even
from sextant.kernels.attention.truth import block_truth


class Budget(Spec):
    """As many blocks as make ``tokens`` tokens, the query's own block included; needs no softmax."""

    kind: Literal["budget"] = "budget"
    tokens: int = Field(ge=1)

    def kept(self, best_NHM: Tensor, current_N: Tensor, block: int) -> Tensor:
        """Which of the candidates, sorted from the best on, are read."""
        return torch.arange(best_NHM.shape[2], device=best_NHM.device) < self.most(best_NHM.shape[2], block)

    def most(self, past: int, block: int) -> int:
        """Most past blocks that a query with ``past`` candidates reads."""
        return min(past, max(1, self.tokens // block) - 1)


class Threshold(Spec):
    """Every block whose share of the gate's softmax over the past is at least ``share``."""

    kind: Literal["threshold"] = "threshold"
    share: float = Field(gt=0, lt=1)

    def kept(self, best_NHM: Tensor, current_N: Tensor, block: int) -> Tensor:
        """Which of the candidates, sorted from the best on, are read."""
        return best_NHM.softmax(-1) >= self.share

    def most(self, past: int, block: int) -> int:
        """Most past blocks that a query with ``past`` candidates reads: shares add up to 1."""
        return min(past, math.floor(1 / self.share))


class Density(Spec):
    """The same ``share`` of the blocks up to its own for every query, rounded up.

    The published ratio fixes one number of blocks for all rows from the length of the whole prompt, which a token
    cannot know; over the causal triangle both read the same share.
    """

    kind: Literal["density"] = "density"
    share: float = Field(gt=0, le=1)

    def kept(self, best_NHM: Tensor, current_N: Tensor, block: int) -> Tensor:
        """Which of the candidates, sorted from the best on, are read."""
        count_N = (self.share * (current_N + 1)).ceil().long() - 1
        return torch.arange(best_NHM.shape[2], device=best_NHM.device) < count_N[:, None, None]

    def most(self, past: int, block: int) -> int:
        """Most past blocks that a query with ``past`` candidates reads."""
        return math.ceil(self.share * (past + 1)) - 1


AnyRule = Annotated[Budget | Threshold | Density, Field(discriminator="kind")]


@dataclass(frozen=True)
class GateShape:
    """Widths of a gate.

    Attributes:
        choosers: heads or groups that choose apart.
        query: width of what a chooser's query is made from, or None: the pooled query itself.
        keys: rows kept of a block; choosers beside each other share one.
        key: width of what a row is made from.
        width: of the rows that are compared.
    """

    choosers: int
    query: int | None
    keys: int
    key: int
    width: int

    @property
    def query_params(self) -> int:
        """Elements of the query matrices."""
        return self.choosers * (self.query or 0) * self.width

    @property
    def key_params(self) -> int:
        """Elements of the key matrices."""
        return self.keys * self.key * self.width


class GatedPattern(SelectingPattern):
    """Base of both gates.

    Attributes:
        rule: from scores to blocks.
        loss_scale: factor on the gate's loss (published: 10). Only clipping sees it where nothing else is trained.
    """

    rule: AnyRule
    loss_scale: float = Field(default=1.0, gt=0)

    @abstractmethod
    def shape(self, kv: KV) -> GateShape:
        """Widths of the gate beside this KV option."""

    @property
    def rows(self) -> int:
        """Neighbouring queries that choose as one."""
        return 1

    @property
    def dense_rows(self) -> int:
        """Rows at the end of what a sequence has so far that read everything."""
        return 0

    @property
    def norm(self) -> AnyNorm | None:
        """Norm over the rows that are compared."""
        return None

    def build(self, width: int, kv: KV, numerics: Numerics) -> SeerAttention:
        return SeerAttention(self, kv)

    def clashes(self, kv: KV, context: int) -> Iterator[tuple[str, str, str]]:
        yield from super().clashes(kv, context)
        kind = getattr(self, "kind", "")
        if not isinstance(kv, GQA):
            what = f"{kind} needs each head's queries and keys before their position code, which latents do not give"
            yield "kv", what, "Use kv gqa"
        elif isinstance(kv.position, RoPE):
            try:
                kv.position.rotary_dim(self.shape(kv).width)
            except ValueError:
                yield "attention.width", f"{kind}'s gate turns an odd number of channels or none", "Use an even width"

    def state(self, kv: KV) -> JointSpec:
        shape, row = self.shape(kv), kv.row()
        return JointSpec.of(
            keys=row,
            plain=RowSpec(row.heads, row.k_dim, 0, window=self.block),
            gates=BlockSpec((shape.keys, shape.width), self.block, self.block),
        )

    def cost(self, width: int, kv: KV, at: At) -> Cost:
        """Of evaluation and decoding; training reads everything. Where the rule depends on the data, the most it reads.

        Reads are the expected ones when the heads of a group choose apart and evenly (spec sparse-attention 1.5).
        """
        heads, groups, k_dim, v_dim = kv.shape
        shape, past = self.shape(kv), at.tokens // self.block
        others, candidates = self._mean_blocks(at.tokens)
        apart = shape.choosers // groups
        distinct = past * (1 - (1 - self._read(past, past) / max(1, past)) ** apart)
        rows_read = groups * (distinct * self.block + at.tokens % self.block)
        gate = shape.query_params / self.rows + shape.key_params / self.block
        gate += shape.choosers * shape.width * candidates / self.rows
        params = shape.query_params + shape.key_params
        if self.norm is not None:
            params += 2 * self.norm.cost(shape.width, at).params
        return Cost(
            params, params,
            flops=2.0 * (heads * (k_dim + v_dim) * (others * self.block + _own(at.tokens, self.block)) + gate),
            state_bytes=self.state(kv).nbytes(at.tokens, at.itemsize),
            read_bytes=round(4 * past * shape.keys * shape.width + rows_read * (k_dim + v_dim) * at.itemsize),
            activation_bytes=at.itemsize * (heads + groups) * (k_dim + v_dim) + 4 * heads,
        )

    def _read(self, past: int, last: int) -> int:
        """Past blocks that a query with ``past`` of them reads, in a sequence whose last query has ``last``."""
        dense = self.dense_rows and past > last - self.dense_rows
        return past if dense else self.rule.most(past, self.block)

    def _mean_blocks(self, tokens: int) -> tuple[float, float]:
        """Past blocks that a query reads, and those it scores, averaged over a sequence."""
        blocks, rest = divmod(tokens, self.block)
        last = (tokens - 1) // self.block
        sizes = [self.block] * blocks + [rest]
        read = sum(size * self._read(past, last) for past, size in enumerate(sizes))
        return read / tokens, sum(size * past for past, size in enumerate(sizes)) / tokens


def _own(tokens: int, block: int) -> float:
    """Keys of its own block that a query reads, averaged over a sequence."""
    blocks, rest = divmod(tokens, block)
    return (blocks * block * (block + 1) + rest * (rest + 1)) / (2 * tokens)


class Seer(GatedPattern):
    """SeerAttention's gate for prompts: every query head chooses.

    ``pool: block`` is the published form: the queries of a block choose as one by their mean, and the last two rows of
    blocks read everything, so a decoding step does too. A choice then depends on later tokens of the query's own block:
    good for prompts of a frozen model, not causal. ``pool: none`` lets every token choose, which is causal and the same
    however a sequence is fed.

    Attributes:
        width: of the rows that are compared, with a query matrix per head and a key matrix per group; None is the
            released form: the pooled query as it is, against a key matrix per query head.
    """

    kind: Literal["seer"] = "seer"
    pool: Literal["block", "none"] = "block"
    width: int | None = Field(default=None, ge=1)

    def shape(self, kv: KV) -> GateShape:
        heads, groups, k_dim, _ = kv.shape
        if self.width is None:
            return GateShape(heads, None, heads, 3 * k_dim, k_dim)
        return GateShape(heads, k_dim, groups, 3 * k_dim, self.width)

    @property
    def rows(self) -> int:
        return self.block if self.pool == "block" else 1

    @property
    def dense_rows(self) -> int:
        return 2 if self.pool == "block" else 0


class SeerR(GatedPattern):
    """SeerAttention-R's gate for decoding: the heads of a KV group choose as one, for every token.

    One matrix makes one row of a group's queries; the target is the largest over the heads of the group.

    Attributes:
        width: of the rows that are compared.
        qk_norm: norm over the channels of both rows before their position code.
    """

    kind: Literal["seer_r"] = "seer_r"
    width: int = Field(default=128, ge=1)
    qk_norm: AnyNorm | None = None

    def shape(self, kv: KV) -> GateShape:
        heads, groups, k_dim, _ = kv.shape
        return GateShape(groups, heads // groups * k_dim, groups, 3 * k_dim, self.width)

    @property
    def norm(self) -> AnyNorm | None:
        return self.qk_norm


class Gate(nn.Module):
    """Scores of blocks. Everything fp32, or fp64 when given fp64."""

    roles = {"query_HDR": Role.ATTENTION_IN, "key_HDR": Role.ATTENTION_IN}

    def __init__(self, shape: GateShape, norm: AnyNorm | None, kv: KV):
        super().__init__()
        self.shape = shape
        self.query_HDR = None
        if shape.query is not None:
            self.query_HDR = nn.Parameter(torch.empty(shape.choosers, shape.query, shape.width))
        self.key_HDR = nn.Parameter(torch.empty(shape.keys, shape.key, shape.width))
        self.q_norm = norm.build(shape.width) if norm else nn.Identity()
        self.k_norm = norm.build(shape.width) if norm else nn.Identity()
        if isinstance(kv, GQA):
            self.position = kv.position.build(shape.choosers, shape.width)

    def keys(self, plain_SGK: Tensor, block: int, start: int) -> Tensor:
        """``[M, H, R]`` of whole blocks of keys, of which the first is number ``start``."""
        blocks_MSGK = plain_SGK.to(self.key_HDR.dtype).unflatten(0, (-1, block))
        pooled = (blocks_MSGK.amax(1), blocks_MSGK.amin(1), blocks_MSGK.mean(1))
        pooled_MHD = torch.cat(pooled, dim=-1).repeat_interleave(self.shape.keys // plain_SGK.shape[1], dim=1)
        rows_MHR = self.k_norm(torch.einsum("mhd,hdr->mhr", pooled_MHD, self.key_HDR))
        place_M = torch.arange(start, start + len(rows_MHR), device=rows_MHR.device) * block
        return turned(self.position, rows_MHR, place_M)

    def forward(self, plain_THK: Tensor, rows: Rows, keys_MHR: Tensor) -> Tensor:
        """Scores ``[N, H, M]`` of queries before their position code."""
        rows_NHR = rows.mean(plain_THK.to(self.key_HDR.dtype))
        if self.query_HDR is not None:
            rows_NHD = rows_NHR.reshape(len(rows_NHR), *self.query_HDR.shape[:2])
            rows_NHR = torch.einsum("nhd,hdr->nhr", rows_NHD, self.query_HDR)
        rows_NHR = turned(self.position, self.q_norm(rows_NHR), rows.place_N)
        keys_MHR = keys_MHR.to(rows_NHR.dtype).repeat_interleave(self.shape.choosers // self.shape.keys, dim=1)
        return torch.einsum("nhr,mhr->nhm", rows_NHR, keys_MHR) * self.shape.width**-0.5


class SeerAttention(SelectingAttention):
    """Full attention beside a gate that learns from it, or attention over what the gate chose."""

    def __init__(self, spec: GatedPattern, kv: KV):
        super().__init__()
        self.spec = spec
        self.gate = Gate(spec.shape(kv), spec.norm, kv)

    def forward(
        self, heads: Heads, x_TD: Tensor, stream: Stream, scores: Scores, state: LayerState | None,
        chosen_THJ: Tensor | None = None,
    ) -> tuple[Tensor, Selection]:
        if self.training and state is None and chosen_THJ is None:
            return self._distil(heads, stream, scores)
        keys = plain = gates = None
        plain_TGK = uncoded(heads.plain_k_TGK).to(heads.v_TGV.dtype)
        if isinstance(state, JointState):
            keys, plain = state.part("keys", RowState), state.part("plain", RowState)
            gates = state.part("gates", BlockState)
            keys.append(*heads.rows, stream)
            plain.append(plain_TGK, heads.v_TGV, stream)
        outputs, chosen = [heads.v_TGV.new_empty(0, heads.q_THK.shape[1], heads.v_TGV.shape[2])], []
        for own in sequences(heads, stream, keys, chosen_THJ):
            plain_SGK = plain_TGK[own.here] if plain is None else plain.sequence(own.index)[0]
            blocks_THJ = self._choose(own, uncoded(heads.plain_q_THK)[own.here], plain_SGK, gates)
            blocks_THJ = own.recorded(blocks_THJ, self.spec.block)
            outputs.append(attend_selected(own.q_THK, own.k_SGK, own.v_SGV, blocks_THJ, self.spec.block, scores)[0])
            chosen.append(blocks_THJ)
        return torch.cat(outputs), Selection(even(chosen), self.spec.block)

    @torch.no_grad()
    def _choose(self, own: Sequence, plain_THK: Tensor, plain_SGK: Tensor, gates: BlockState | None) -> Tensor:
        def make(start: int, stop: int) -> Tensor:
            ahead = len(own.k_SGK) - len(plain_SGK)  # tokens that the last rows no longer hold
            whole_SGK = plain_SGK[start * spec.block - ahead : stop * spec.block - ahead]
            return self.gate.keys(whole_SGK, spec.block, start)

        spec, complete = self.spec, len(own.k_SGK) // self.spec.block
        rows = Rows.of(own, spec.rows, spec.block)
        keys_MHR = make(0, complete) if gates is None else gates.close(own.index, len(own.k_SGK), make)
        return self._pick(self.gate(plain_THK, rows, keys_MHR), rows)

    def _distil(self, heads: Heads, stream: Stream, scores: Scores) -> tuple[Tensor, Selection]:
        """Full attention, and what the gate would choose, with its loss. The base gets no gradient from that."""
        spec, losses, chosen = self.spec, [heads.v_TGV.new_zeros((), dtype=self.gate.key_HDR.dtype)], []
        for own in sequences(heads, stream, None):
            rows, whole = Rows.of(own, spec.rows, spec.block), len(own.k_SGK) // spec.block * spec.block
            plain_SGK = uncoded(heads.plain_k_TGK)[own.here][:whole].detach().to(heads.v_TGV.dtype)
            keys_MHR = self.gate.keys(plain_SGK, spec.block, 0)
            scores_NHM = self.gate(uncoded(heads.plain_q_THK)[own.here].detach(), rows, keys_MHR)
            truth_THM = block_truth(own.q_THK, own.k_SGK, spec.block, scores)[..., : len(keys_MHR)]
            losses.append(self._loss(scores_NHM, self._target(truth_THM, rows), rows))
            chosen.append(self._pick(scores_NHM.detach(), rows))
        o_THV = attend(heads.q_THK, Keys(heads.k_TGK, heads.v_TGV), stream, Span(), scores)
        loss = spec.loss_scale * torch.stack(losses).sum()
        return o_THV, Selection(even(chosen), spec.block, loss, applied=False)

    def _target(self, truth_THM: Tensor, rows: Rows) -> Tensor:
        """``[N, H, M]``: block maxima over the queries of a row and the heads of a chooser, which add up to 1."""
        shared_THM = truth_THM.unflatten(1, (self.gate.shape.choosers, -1)).amax(2)
        peaks_NHM = rows.largest(shared_THM) * rows.past(truth_THM.shape[2])
        return peaks_NHM / peaks_NHM.sum(-1, keepdim=True).clamp_min(torch.finfo(peaks_NHM.dtype).tiny)

    def _loss(self, scores_NHM: Tensor, target_NHM: Tensor, rows: Rows) -> Tensor:
        """KL divergence in nats, mean over choosers, summed over queries; 0 for a query without candidates."""
        hidden = ~rows.past(scores_NHM.shape[2])
        logs_NHM = scores_NHM.masked_fill(hidden, -1e9).log_softmax(-1)  # finite: a row may have no candidate at all
        kl_N = (torch.xlogy(target_NHM, target_NHM) - target_NHM * logs_NHM).sum(-1).mean(1)
        return (kl_N * rows.count_N).sum()

    def _pick(self, scores_NHM: Tensor, rows: Rows) -> Tensor:
        """int64 ``[T, H, J]``: the query's own block, then candidates from the best on; ties to the lower block."""
        scores_NHM = scores_NHM.masked_fill(~rows.past(scores_NHM.shape[2]), -math.inf)
        best_NHM, order_NHM = scores_NHM.sort(dim=-1, descending=True, stable=True)
        kept_NHM = self.spec.rule.kept(best_NHM, rows.block_N, self.spec.block)
        dense_N = rows.block_N > rows.last - self.spec.dense_rows
        kept_NHM = (kept_NHM | dense_N[:, None, None]) & (best_NHM > -math.inf)
        places = int(kept_NHM.sum(-1).amax())
        own_NH1 = rows.block_N[:, None, None].expand(-1, scores_NHM.shape[1], 1)
        chosen_NHJ = torch.cat([own_NH1, order_NHM.where(kept_NHM, -1)[..., :places]], dim=-1)
        return chosen_NHJ[rows.row_T]
