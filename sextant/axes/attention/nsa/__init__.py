"""NSA, native sparse attention: a coarse look at everything, a close look at chosen blocks, and a window (2502.11089).

``o = g_cmp o_cmp + g_slc o_slc + g_win o_win`` with sigmoid gates from x. The compression branch attends to one row per
window of ``length`` tokens; what it looks at decides, for a KV group's heads together, which blocks the selection
branch reads. The choice has no gradient: the selector learns because its compressed rows are attended (spec
sparse-attention 5). The paper's choices are the defaults; ``phi: mean``, ``separate_kv: false`` and
``cmp_rope: post`` together are fla's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sextant.axes.attention.base import SelectingAttention, SelectingPattern, Selection, Sequence, sequences
from sextant.axes.attention.nsa.phi import AnyPhi, MeanPhi, MLPPhi
from sextant.axes.kv.base import KV, Heads
from sextant.axes.kv.gqa import GQA
from sextant.axes.kv.position import RoPE
from sextant.axes.numerics import Numerics
from sextant.axes.stability import Linear, Role, Values
from sextant.core.cost import At, Cost
from sextant.core.errors import UsageError
from sextant.core.state import BlockSpec, BlockState, JointSpec, JointState, LayerState, RowSpec, RowState, StateSpec
from sextant.core.stream import Stream
from sextant.kernels.attention import Scores, Span
from sextant.kernels.attention.compressed import Grid, attend_compressed
from sextant.kernels.attention.last import attend_last
from sextant.kernels.attention.selected import attend_selected
from sextant.kernels.attention.topk import choose, even, selected_keys

__all__ = ["NSA", "AnyPhi", "MLPPhi", "MeanPhi"]


class NSA(SelectingPattern):
    """Three gated branches: compression, selection, window.

    Attributes:
        block: tokens of a selection block (l').
        length, stride: tokens of a compression window (l), and between the starts of two (d).
        top_k: blocks that the selection branch reads (n), the forced ones counted.
        initial, local: the first blocks of the sequence and the last ones, the current one among them, are forced.
        window: tokens of the window branch (w), the query's own included.
        phi: what makes one row of a compression window.
        gates: a gate per branch for every head, or one for all heads.
        separate_kv: keys and values of its own for every branch (paper), or one for all (fla).
        cmp_rope: compressed keys are turned by the place of their window's first token (strided), are never turned, nor
            are their queries (none), or are made of turned keys (post).
    """

    kind: Literal["nsa"] = "nsa"
    block: int = Field(default=64, ge=1)
    length: int = Field(default=32, ge=1)
    stride: int = Field(default=16, ge=1)
    top_k: int = Field(default=16, ge=1)
    initial: int = Field(default=1, ge=0)
    local: int = Field(default=2, ge=1)
    window: int = Field(default=512, ge=1)
    phi: AnyPhi
    gates: Literal["head", "token"] = "head"
    separate_kv: bool = True
    cmp_rope: Literal["strided", "none", "post"] = "strided"

    @model_validator(mode="after")
    def _fits(self) -> NSA:
        if self.length % self.stride:
            raise ValueError(f"length {self.length} must be a multiple of stride {self.stride}")
        if self.block % self.stride:
            raise ValueError(f"block {self.block} must be a multiple of stride {self.stride}")
        if self.length > self.block:
            raise ValueError(f"length {self.length} exceeds block {self.block}: a block could be chosen by no window")
        if self.initial + self.local > self.top_k:
            raise ValueError(f"initial {self.initial} and local {self.local} exceed top_k {self.top_k}")
        if self.cmp_rope == "post" and not isinstance(self.phi, MeanPhi):
            raise ValueError("cmp_rope post needs phi mean: an MLP over turned keys would see absolute positions")
        return self

    @property
    def grid(self) -> Grid:
        """Where compression windows and blocks lie."""
        return Grid(self.length, self.stride, self.block)

    def clashes(self, kv: KV, context: int) -> Iterator[tuple[str, str, str]]:
        yield from super().clashes(kv, context)
        if not isinstance(kv, GQA):
            yield "kv", "nsa's branches need keys and values per head, which latents have not", "Use kind: gqa"
        elif self.cmp_rope == "strided" and not isinstance(kv.position, RoPE):
            yield "attention.cmp_rope", "strided turns compressed keys, and there is no rope", "Use none"
        if self.window > context:
            yield "attention.window", f"window {self.window} exceeds the context {context}", "Use a smaller window"

    def build(self, width: int, kv: KV, numerics: Numerics) -> NSAAttention:
        return NSAAttention(self, width, per_head(kv), numerics)

    def state(self, kv: KV) -> JointSpec:
        row = kv.row()
        parts: dict[str, StateSpec] = {
            "keys": row,
            "compressed_k": BlockSpec((row.heads, row.k_dim), self.length, self.stride, None),
            "compressed_v": BlockSpec((row.heads, row.v_dim), self.length, self.stride, None),
        }
        if self.separate_kv:
            parts |= {"window": kv.row(self.window), "open": kv.row(self.length)}
        elif self.cmp_rope != "post":
            parts["open"] = RowSpec(row.heads, row.k_dim, 0, self.length)
        return JointSpec.of(**parts)

    def cost(self, width: int, kv: KV, at: At) -> Cost:
        """Own projections, gates and phi; scores and sums of the three branches (spec sparse-attention 1.5)."""
        heads, groups, k_dim, v_dim = kv.shape
        seen = self.grid.all_complete(at.tokens) / at.tokens
        selected = selected_keys(at.tokens, self.block, self.top_k) / at.tokens
        keys = seen + selected + Span(self.window).mean_keys(at.tokens)
        rows = groups * (3 if self.separate_kv else 1)
        own = Cost(
            flops=2.0 * heads * (k_dim + v_dim) * keys,
            state_bytes=self.state(kv).nbytes(at.tokens, at.itemsize),
            read_bytes=self._read_bytes(kv, at),
            activation_bytes=at.itemsize * (heads * (k_dim + 4 * v_dim) + rows * (k_dim + v_dim)) + 12 * heads,
        )
        rate = self.grid.complete(at.tokens) / at.tokens
        phis = (self.phi.cost(groups, self.length, dim, rate, at) for dim in (k_dim, v_dim))
        gates = Cost.of_matrix(width, 3 * (heads if self.gates == "head" else 1), at, keep_input=False)
        return sum(phis, start=own + gates) + self._branches_cost(width, per_head(kv), at)

    def _branches_cost(self, width: int, kv: GQA, at: At) -> Cost:
        """Projections of the compression and the window branch."""
        if not self.separate_kv:
            return Cost()
        _, groups, k_dim, v_dim = kv.shape
        one = Cost.of_matrix(width, groups * (k_dim + v_dim), at, keep_input=False)
        if kv.bias:
            one += Cost(groups * (k_dim + v_dim), groups * (k_dim + v_dim))
        if kv.qk_norm is not None:
            one += kv.qk_norm.cost(k_dim, at)
        return 2 * one

    def _read_bytes(self, kv: KV, at: At) -> int:
        """Compressed rows, the chosen blocks' rows, the window's, and those of a compression window that this step
        completes.
        """
        row, last = kv.row(), at.tokens - 1
        past = min(self.top_k - 1, last // self.block)
        completes = self.grid.complete(at.tokens) > self.grid.complete(last)
        rows = self.grid.complete(at.tokens) + past * self.block + last % self.block + 1 + min(at.tokens, self.window)
        return (rows + completes * self.length) * row.heads * (row.k_dim + row.v_dim) * at.itemsize


def per_head(kv: KV) -> GQA:
    """The one KV option with keys per head.

    Raises:
        UsageError: another one.
    """
    if not isinstance(kv, GQA):
        raise UsageError("nsa needs keys and values per head", got=type(kv).__name__, fix="Use kind: gqa")
    return kv


class Branch(nn.Module):
    """Keys, not yet turned, and values of one branch by projections of its own."""

    def __init__(self, kv: GQA, width: int):
        super().__init__()
        _, groups, self.k_dim, self.v_dim = kv.shape
        self.k = Linear(width, groups * self.k_dim, Role.ATTENTION_IN, kv.bias)
        self.v = Linear(width, groups * self.v_dim, Role.ATTENTION_IN, kv.bias, values=Values())
        self.norm = kv.qk_norm.build(self.k_dim) if kv.qk_norm else nn.Identity()

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        k_TGK = self.k(x_TD).unflatten(-1, (-1, self.k_dim))
        v_TGV = self.v(x_TD).unflatten(-1, (-1, self.v_dim))
        return self.norm(k_TGK), v_TGV


@dataclass(frozen=True)
class Rows:
    """Rows of a branch: the step's own, or those of a ring that has just taken them in."""

    k_TGK: Tensor
    v_TGV: Tensor
    ring: RowState | None

    @classmethod
    def of_step(cls, k_TGK: Tensor, v_TGV: Tensor, part: str, stream: Stream, joint: JointState | None) -> Rows:
        """Remembered in this part of the state, if there is one."""
        ring = None if joint is None else joint.part(part, RowState)
        if ring is not None:
            ring.append(k_TGK, v_TGV, stream)
        return cls(k_TGK, v_TGV, ring)

    def of(self, own: Sequence) -> tuple[Tensor, Tensor]:
        """The last rows of a sequence, its own of this step among them."""
        if self.ring is not None:
            return self.ring.sequence(own.index)
        return self.k_TGK[own.here], self.v_TGV[own.here]


class NSAAttention(SelectingAttention):
    """Compress, choose, attend three times, gate."""

    def __init__(self, spec: NSA, width: int, kv: GQA, numerics: Numerics):
        super().__init__()
        self.spec, self.numerics = spec, numerics
        heads, groups, k_dim, v_dim = kv.shape
        self.gate = Linear(width, 3 * (heads if spec.gates == "head" else 1), Role.ATTENTION_IN)
        self.phi_k = spec.phi.build(groups, spec.length, k_dim)
        self.phi_v = spec.phi.build(groups, spec.length, v_dim)
        self.coarse = Branch(kv, width) if spec.separate_kv else None
        self.near = Branch(kv, width) if spec.separate_kv else None
        self.position = kv.position.build(heads, k_dim)

    def forward(
        self, heads: Heads, x_TD: Tensor, stream: Stream, scores: Scores, state: LayerState | None,
        chosen_THJ: Tensor | None = None,
    ) -> tuple[Tensor, Selection]:
        joint, x_TD = state if isinstance(state, JointState) else None, self.numerics.lower(x_TD)
        keys = None if joint is None else joint.part("keys", RowState)
        if keys is not None:
            keys.append(*heads.rows, stream)
        coarse, near = self._coarse_rows(heads, x_TD, stream, joint), self._near_rows(x_TD, stream, joint)
        none_THV = heads.v_TGV.new_empty(0, heads.q_THK.shape[1], heads.v_TGV.shape[2])
        branches, chosen = [3 * (none_THV,)], []
        for own in sequences(heads, stream, keys, chosen_THJ):
            coarse_THV, blocks_TGJ = self._look(heads, own, coarse, stream, scores, joint)
            blocks_TGJ = own.recorded(blocks_TGJ, self.spec.block)
            picked_THV, _ = attend_selected(own.q_THK, own.k_SGK, own.v_SGV, blocks_TGJ, self.spec.block, scores)
            near_rows = (own.k_SGK, own.v_SGV) if near is None else near.of(own)
            near_THV = attend_last(own.q_THK, *near_rows, self.spec.window, scores)
            branches.append((coarse_THV, picked_THV, near_THV))
            chosen.append(blocks_TGJ)
        o_THV = self._gated(x_TD, [torch.cat(pieces) for pieces in zip(*branches, strict=True)])
        return o_THV, Selection(even(chosen), self.spec.block)

    def _look(
        self, heads: Heads, own: Sequence, coarse: Rows | None, stream: Stream, scores: Scores, joint: JointState | None
    ) -> tuple[Tensor, Tensor]:
        """The compression branch: its output, and the blocks that it makes the selection branch read."""
        q_THK = own.q_THK
        if self.spec.cmp_rope == "none" and heads.plain_q_THK is not None:
            q_THK = heads.plain_q_THK[own.here].to(q_THK.dtype)
        k_SGK, v_SGV = self._compressed(own, coarse, stream, joint)
        return attend_compressed(q_THK, k_SGK, v_SGV, own.first, self.spec.grid, scores, self._choose)

    def _compressed(
        self, own: Sequence, coarse: Rows | None, stream: Stream, joint: JointState | None
    ) -> tuple[Tensor, Tensor]:
        """One key and one value for every complete window; those made in earlier steps come from the state."""
        k_SGK, v_SGV = (own.k_SGK, own.v_SGV) if coarse is None else coarse.of(own)
        if self.coarse is None:
            v_SGV = own.v_SGV
        grid, tokens = self.spec.grid, len(own.k_SGK)

        def make_k(start: int, stop: int) -> Tensor:
            made_SGK = self.phi_k(grid.windows(k_SGK, tokens, start, stop))
            return made_SGK if self.spec.cmp_rope != "strided" else self._turn_windows(made_SGK, start, own, stream)

        def make_v(start: int, stop: int) -> Tensor:
            return self.phi_v(grid.windows(v_SGV, tokens, start, stop))

        if joint is None:
            return make_k(0, grid.complete(tokens)), make_v(0, grid.complete(tokens))
        states = (joint.part(name, BlockState) for name in ("compressed_k", "compressed_v"))
        k, v = (kept.close(own.index, tokens, make) for kept, make in zip(states, (make_k, make_v), strict=True))
        return k, v

    def _choose(self, weights_TGS: Tensor, first: int) -> Tensor:
        spec = self.spec
        scores_TGM = spec.grid.importance(weights_TGS, first + len(weights_TGS))
        return choose(scores_TGM, first, spec.block, spec.top_k, spec.local - 1, spec.initial)

    def _coarse_rows(
        self, heads: Heads, x_TD: Tensor, stream: Stream, joint: JointState | None
    ) -> Rows | None:
        """What is compressed, where it is not what the selection branch reads; shared values are left out."""
        if self.coarse is None and self.spec.cmp_rope == "post":
            return None
        plain_TGK = heads.k_TGK if heads.plain_k_TGK is None else heads.plain_k_TGK
        k_TGK, v_TGV = (plain_TGK, heads.v_TGV[..., :0]) if self.coarse is None else self.coarse(x_TD)
        if self.spec.cmp_rope == "post":
            k_TGK = self._turn(k_TGK, stream)
        return Rows.of_step(k_TGK.to(v_TGV.dtype), v_TGV, "open", stream, joint)

    def _near_rows(self, x_TD: Tensor, stream: Stream, joint: JointState | None) -> Rows | None:
        """The window branch's own rows."""
        if self.near is None:
            return None
        k_TGK, v_TGV = self.near(x_TD)
        return Rows.of_step(self._turn(k_TGK, stream).to(v_TGV.dtype), v_TGV, "window", stream, joint)

    def _turn(self, k_TGK: Tensor, stream: Stream) -> Tensor:
        return self.position(k_TGK[:, :0], k_TGK, stream)[1]

    def _turn_windows(self, k_SGK: Tensor, start: int, own: Sequence, stream: Stream) -> Tensor:
        """By the position of each window's first token."""
        place_S = torch.arange(start, start + len(k_SGK), device=k_SGK.device) * self.spec.stride
        origin = stream.positions_T[own.here][0] - own.first
        ends = torch.tensor([0, len(k_SGK)], dtype=torch.int32, device=k_SGK.device)
        return self._turn(k_SGK, Stream(origin + place_S, ends, len(k_SGK)))

    def _gated(self, x_TD: Tensor, branches_THV: list[Tensor]) -> Tensor:
        """The sum over branches in fp32, in the order compression, selection, window."""
        gates_TH = self.gate(x_TD).to(torch.promote_types(x_TD.dtype, torch.float32)).sigmoid()
        gates = gates_TH.unflatten(-1, (3, -1)).unbind(1)
        o_THV = torch.stack([gate[..., None] * o for gate, o in zip(gates, branches_THV, strict=True)]).sum(0)
        return o_THV.to(branches_THV[0].dtype)
