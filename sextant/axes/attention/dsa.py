"""DeepSeek sparse attention: a small indexer scores every past token, and all heads read the best (DeepSeek-V3.2).

``I = sum_j w_j relu(q_j . k)`` over a few index heads with one index key per token; the ``top_k`` tokens with the
largest scores are read, or, with ``block`` above 1, the blocks whose best token scores highest and always the current
one. While a sequence is not longer than ``top_k`` all of it is read (spec deepseek-v3, appendix A; sparse-attention
10).

The language loss gives the indexer no gradient. It learns what attention looks at: the divergence of its softmax from
the probabilities of the main attention, summed over heads. In the ``dense`` stage everything is read and compared, to
be run with all but ``*.indexer.*`` frozen; in the ``sparse`` stage only what was chosen is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sextant.axes.attention.base import SelectingAttention, SelectingPattern, Selection, Sequence, sequences
from sextant.axes.kv.base import KV, Heads
from sextant.axes.kv.position import RoPE, Unturned
from sextant.axes.numerics import Numerics
from sextant.axes.stability import LayerNorm, Linear, Role
from sextant.core.cost import At, Cost
from sextant.core.errors import UsageError
from sextant.core.state import JointSpec, JointState, Keys, LayerState, RowSpec, RowState
from sextant.core.stream import Stream
from sextant.kernels.attention import Scores, Span, attend
from sextant.kernels.attention.selected import attend_selected, selected_mask
from sextant.kernels.attention.topk import choose, even, selected_keys

CHUNK = 256
"""Queries whose scores are held at once for every head."""

KEY_NORM = LayerNorm(eps=1e-6)


class DSA(SelectingPattern):
    """The ``top_k`` tokens (or blocks, the current one included) that an indexer scores highest.

    Attributes:
        heads, head_dim: of the indexer; its one key per token is ``head_dim`` wide.
        rope_dim: first channels of the indexer that turn, by the KV option's rotary code in the half layout.
        stage: what training reads and compares: everything, or what was chosen.
        loss_scale: factor of the indexer's loss.
    """

    kind: Literal["dsa"] = "dsa"
    block: int = Field(default=1, ge=1)
    top_k: int = Field(ge=1)
    heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    rope_dim: int = Field(default=0, ge=0)
    stage: Literal["dense", "sparse"] = "sparse"
    loss_scale: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> DSA:
        if self.rope_dim % 2 or self.rope_dim > self.head_dim:
            raise ValueError(f"rope_dim {self.rope_dim} must be even and at most head_dim {self.head_dim}")
        return self

    def clashes(self, kv: KV, context: int) -> Iterator[tuple[str, str, str]]:
        yield from super().clashes(kv, context)
        if self.rope_dim and not isinstance(getattr(kv, "position", None), RoPE):
            what = f"the indexer turns {self.rope_dim} channels by the kv option's rotary code, which has none"
            yield "attention.rope_dim", what, "Set it to 0 or give kv a rope"

    def build(self, width: int, kv: KV, numerics: Numerics) -> DSAAttention:
        return DSAAttention(self, width, kv, numerics)

    def state(self, kv: KV) -> JointSpec:
        return JointSpec.of(keys=kv.row(), index=RowSpec(1, self.head_dim, 0))

    def cost(self, width: int, kv: KV, at: At) -> Cost:
        """The index is still quadratic, in small; the rest grows with what is chosen. A step reads every index key."""
        heads, groups, k_dim, v_dim = kv.shape
        row, last = kv.row(), self._keys(at.tokens) - self._keys(at.tokens - 1)
        own = Cost.of_matrix(kv.query_width(width), self.heads * self.head_dim, at, keep_input=False)
        own += Cost.of_matrix(width, self.head_dim + self.heads, at, keep_input=False)
        own += KEY_NORM.cost(self.head_dim, at)
        scoring = 2.0 * self.heads * (self.head_dim + 1) * (at.tokens + 1) / 2
        return own + Cost(
            flops=scoring + 2.0 * heads * (k_dim + v_dim) * self._keys(at.tokens) / at.tokens,
            state_bytes=self.state(kv).nbytes(at.tokens, at.itemsize),
            read_bytes=(at.tokens * self.head_dim + last * row.heads * (row.k_dim + row.v_dim)) * at.itemsize,
            activation_bytes=at.itemsize * (heads + groups) * (k_dim + v_dim) + 4 * heads,
        )

    def _keys(self, tokens: int) -> int:
        """Keys read by all tokens of a sequence of this length."""
        dense = tokens * (tokens + 1) // 2
        return dense if self.stage == "dense" else selected_keys(tokens, self.block, self.top_k)


@dataclass(frozen=True)
class Index:
    """What an indexer makes of a step's tokens: queries of its heads, one key, and fp32 weights of the heads, which
    hold the factor ``(heads * head_dim)^-1/2``.
    """

    q_THK: Tensor
    k_TGK: Tensor
    weights_TH: Tensor


class Indexer(nn.Module):
    """Projections of the index, from detached rows; queries from the main queries' latent where there is one."""

    def __init__(self, spec: DSA, width: int, kv: KV, numerics: Numerics):
        super().__init__()
        self.spec, self.numerics = spec, numerics
        self.q = Linear(kv.query_width(width), spec.heads * spec.head_dim, Role.ATTENTION_IN)
        self.k = Linear(width, spec.head_dim, Role.ATTENTION_IN)
        self.k_norm = KEY_NORM.build(spec.head_dim)
        self.weights = Linear(width, spec.heads, Role.ATTENTION_IN)
        code = getattr(kv, "position", None)
        self.position: nn.Module = Unturned()
        if isinstance(code, RoPE) and spec.rope_dim:
            self.position = code.replace(layout="half", fraction=1.0).build(1, spec.rope_dim)

    def forward(self, x_TD: Tensor, heads: Heads, stream: Stream) -> Index:
        spec, x_TD = self.spec, self.numerics.lower(x_TD.detach())
        source = x_TD if heads.q_latent_TR is None else heads.q_latent_TR.detach()
        q_THK = self.q(source).unflatten(-1, (spec.heads, -1))
        k_TGK = self.k_norm(self.k(x_TD)).to(q_THK.dtype)[:, None]
        q_turned, k_turned = self.position(q_THK[..., : spec.rope_dim], k_TGK[..., : spec.rope_dim], stream)
        q_THK = torch.cat([q_turned, q_THK[..., spec.rope_dim :]], dim=-1)
        k_TGK = torch.cat([k_turned, k_TGK[..., spec.rope_dim :]], dim=-1)
        weights_TH = wide(self.weights(x_TD)) * (spec.heads * spec.head_dim) ** -0.5
        return Index(q_THK, k_TGK, weights_TH)


class DSAAttention(SelectingAttention):
    """Index, choose, attend; in training also the indexer's loss."""

    def __init__(self, spec: DSA, width: int, kv: KV, numerics: Numerics):
        super().__init__()
        self.spec = spec
        self.indexer = Indexer(spec, width, kv, numerics)

    def forward(
        self, heads: Heads, x_TD: Tensor, stream: Stream, scores: Scores, state: LayerState | None,
        chosen_THJ: Tensor | None = None,
    ) -> tuple[Tensor, Selection]:
        dense = self.spec.stage == "dense"
        if dense and chosen_THJ is not None:
            raise UsageError("dsa reads all in its dense stage, and a record says what to read", fix="Use sparse")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.training and state is None):
            index = self.indexer(x_TD, heads, stream)
        held, keys, index_keys = Keys(heads.k_TGK, heads.v_TGV), None, None
        if isinstance(state, JointState):
            keys, index_keys = state.part("keys", RowState), state.part("index", RowState)
            held = keys.append(*heads.rows, stream)
            index_keys.append(index.k_TGK, index.k_TGK, stream)
        outputs, chosen, losses = [heads.v_TGV.new_empty(0, heads.q_THK.shape[1], heads.v_TGV.shape[2])], [], []
        for own in sequences(heads, stream, keys, chosen_THJ):
            k_SGK = index.k_TGK[own.here] if index_keys is None else index_keys.sequence(own.index)[0]
            index_TS = index_scores(index.q_THK[own.here], k_SGK[:, 0], index.weights_TH[own.here])
            blocks_THJ = own.recorded(self._choose(index_TS.detach(), own.first), self.spec.block)
            chosen.append(blocks_THJ)
            if not dense:
                outputs.append(attend_selected(own.q_THK, own.k_SGK, own.v_SGV, blocks_THJ, self.spec.block, scores)[0])
            if index_TS.requires_grad:
                losses.append(self._loss(index_TS, own, blocks_THJ, scores))
        o_THV = attend(heads.q_THK, held, stream, Span(), scores) if dense else torch.cat(outputs)
        loss = self.spec.loss_scale * torch.stack(losses).sum() if losses else None
        return o_THV, Selection(even(chosen), self.spec.block, loss, not dense)

    def _choose(self, index_TS: Tensor, first: int) -> Tensor:
        """int64 ``[T, 1, J]``: token or block numbers; ties go to the lower."""
        block, top_k = self.spec.block, self.spec.top_k
        if block == 1:
            return best_tokens(index_TS, first, top_k)[:, None]
        whole = index_TS.shape[1] // block * block
        best_TM = index_TS[:, :whole].unflatten(1, (whole // block, block)).amax(-1)
        return choose(best_TM[:, None], first, block, top_k)

    def _loss(self, index_TS: Tensor, own: Sequence, blocks_THJ: Tensor, scores: Scores) -> Tensor:
        """Sum over the queries of KL(main attention || index), over what the stage reads."""
        token_S = torch.arange(len(own.k_SGK), device=index_TS.device)
        mask_TS = token_S <= token_S[own.first :, None]
        if self.spec.stage == "sparse":
            mask_TS = mask_TS & selected_mask(blocks_THJ, self.spec.block, len(own.k_SGK), 1)[0]
        mass_TS = head_mass(own.q_THK, own.k_SGK, mask_TS, scores)
        log_index_TS = index_TS.masked_fill(~mask_TS, -math.inf).log_softmax(-1).masked_fill(~mask_TS, 0.0)
        return (torch.xlogy(mass_TS, mass_TS) - mass_TS * log_index_TS).sum()


def wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def index_scores(q_THK: Tensor, k_SK: Tensor, weights_TH: Tensor) -> Tensor:
    """``I_TS = sum_h w_h relu(q_h . k)`` in fp32, some queries at a time."""
    k_SK, pieces = wide(k_SK), []
    for q, weights in zip(wide(q_THK).split(CHUNK), weights_TH.split(CHUNK), strict=True):
        pieces.append(torch.einsum("ths,th->ts", F.relu(torch.einsum("thk,sk->ths", q, k_SK)), weights))
    return torch.cat(pieces)


def best_tokens(index_TS: Tensor, first: int, top_k: int) -> Tensor:
    """The ``top_k`` best scored tokens up to each query's own, ``[T, J]`` with J at most ``top_k``; -1 for none."""
    tokens, count = index_TS.shape
    token_T = torch.arange(first, first + tokens, device=index_TS.device)
    after_TS = torch.arange(count, device=index_TS.device) > token_T[:, None]
    best_TS, token_TS = index_TS.masked_fill(after_TS, -math.inf).sort(dim=-1, descending=True, stable=True)
    return token_TS[:, :top_k].masked_fill(best_TS[:, :top_k] == -math.inf, -1)


@torch.no_grad()
def head_mass(q_THK: Tensor, k_SGK: Tensor, mask_TS: Tensor, scores: Scores) -> Tensor:
    """What attention over the masked keys looks at, summed over heads and made to sum to 1, ``[T, S]``."""
    k_SGK, pieces = wide(k_SGK), []
    q_TGNK = wide(q_THK).unflatten(1, (k_SGK.shape[1], -1))
    for q, mask in zip(q_TGNK.split(CHUNK), mask_TS.split(CHUNK), strict=True):
        dots_GNTS = torch.einsum("tgnk,sgk->gnts", q, k_SGK) * scores.scale
        pieces.append(dots_GNTS.masked_fill(~mask, -math.inf).softmax(-1).mean((0, 1)))
    return torch.cat(pieces)
