"""MoBA: every query reads its own block of keys and the blocks whose mean key it likes best (2502.13189).

Scores of blocks are ``q . mean(k)``; candidates are complete blocks of the past; ``top_k`` counts the current block,
which is always read. No parameters, and no gradient through the choice: it learns because chosen keys are attended
(spec sparse-attention 1.4, 3).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sextant.axes.attention.base import Attention, SelectingPattern, Selection, Sequence, sequences
from sextant.axes.kv.base import KV, Heads
from sextant.axes.numerics import Numerics
from sextant.core.cost import At, Cost
from sextant.core.state import BlockSpec, BlockState, JointSpec, JointState, LayerState, RowState
from sextant.core.stream import Stream
from sextant.kernels.attention import Scores
from sextant.kernels.attention.selected import attend_selected
from sextant.kernels.attention.topk import block_means, top_blocks


class MoBA(SelectingPattern):
    """The current block, and the ``top_k - 1`` past blocks with the likeliest mean key.

    Attributes:
        per: who chooses: every query head, or every KV group by the sum over its heads.
    """

    kind: Literal["moba"] = "moba"
    top_k: int = Field(ge=1)
    per: Literal["head", "group"] = "head"

    def build(self, width: int, kv: KV, numerics: Numerics) -> MoBAAttention:
        return MoBAAttention(self)

    def state(self, kv: KV) -> JointSpec:
        row = kv.row()
        return JointSpec.of(keys=row, means=BlockSpec((row.heads, row.k_dim), self.block, self.block))

    def cost(self, width: int, kv: KV, at: At) -> Cost:
        """Reads are the expected ones when the heads of a group choose apart (spec sparse-attention 1.5)."""
        heads, groups, k_dim, v_dim = kv.shape
        row, blocks = kv.row(), at.tokens // self.block
        others = sum(min(self.top_k - 1, t // self.block) for t in range(at.tokens)) / at.tokens
        own = sum(t % self.block + 1 for t in range(at.tokens)) / at.tokens
        candidates = sum(t // self.block for t in range(at.tokens)) / at.tokens
        read = min(self.top_k - 1, blocks)
        apart = row.heads * blocks * (1 - (1 - read / max(1, blocks)) ** (heads // row.heads))
        distinct = row.heads * read if self.per == "group" else apart
        return Cost(
            flops=2.0 * heads * (k_dim + v_dim) * (own + others * self.block) + 2.0 * heads * k_dim * candidates,
            state_bytes=self.state(kv).nbytes(at.tokens, at.itemsize),
            read_bytes=round(
                4 * blocks * row.heads * row.k_dim
                + (distinct * self.block + row.heads * (at.tokens % self.block or self.block))
                * (row.k_dim + row.v_dim) * at.itemsize
            ),
            activation_bytes=at.itemsize * (heads + groups) * (k_dim + v_dim) + 4 * heads,
        )


class MoBAAttention(Attention):
    """Choose, then attend to what was chosen."""

    def __init__(self, spec: MoBA):
        super().__init__()
        self.spec = spec

    def forward(
        self, heads: Heads, x_TD: Tensor, stream: Stream, scores: Scores, state: LayerState | None
    ) -> tuple[Tensor, Selection]:
        keys = means = None
        if isinstance(state, JointState):
            keys, means = state.part("keys", RowState), state.part("means", BlockState)
            keys.append(*heads.rows, stream)
        outputs, chosen = [], []
        for own in sequences(heads, stream, keys):
            blocks_THJ = self._choose(own, means)
            outputs.append(attend_selected(own.q_THK, own.k_SGK, own.v_SGV, blocks_THJ, self.spec.block, scores)[0])
            chosen.append(blocks_THJ)
        return torch.cat(outputs), Selection(torch.cat(chosen), self.spec.block)

    @torch.no_grad()
    def _choose(self, own: Sequence, means: BlockState | None) -> Tensor:
        def make(start: int, stop: int) -> Tensor:
            return block_means(own.k_SGK, self.spec.block, start, stop)

        complete = len(own.k_SGK) // self.spec.block
        means_MGK = make(0, complete) if means is None else means.close(own.index, len(own.k_SGK), make)
        return top_blocks(own.q_THK, means_MGK, own.first, self.spec.block, self.spec.top_k, self.spec.per == "group")
