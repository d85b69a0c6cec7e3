"""InfLLM-V2: a dense GQA model made sparse without a new parameter, and dense again at will (2509.24663).

Keys are mean-pooled over windows of ``length`` tokens; a query's softmax over them, summed over the heads of its KV
group, gives each block the largest weight among the windows that touch it. The ``top_k`` best blocks, the first ones
among them, and the blocks of the local window are read in one softmax, so with all blocks it is full attention (spec
sparse-attention 7). The choice has no gradient. Scores of windows are normalised exactly; the paper's cheaper estimate
of the normaliser is a matter of its kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sextant.axes.attention.base import SelectingAttention, SelectingPattern, Selection, Sequence, sequences
from sextant.axes.kv.base import KV, Heads
from sextant.axes.numerics import Numerics
from sextant.core.cost import At, Cost
from sextant.core.state import BlockSpec, BlockState, JointSpec, JointState, LayerState, RowState
from sextant.core.stream import Stream
from sextant.kernels.attention import Scores
from sextant.kernels.attention.compressed import Grid, choose_compressed
from sextant.kernels.attention.last import attend_last
from sextant.kernels.attention.selected import attend_selected
from sextant.kernels.attention.topk import choose, even, selected_keys


class InfLLMV2(SelectingPattern):
    """Blocks chosen by pooled keys, and the local window, in one softmax.

    Attributes:
        length, stride: tokens of a pooled window, and between the starts of two.
        top_k: blocks beside the local ones; the ``initial`` ones count.
        window: tokens of the local blocks, the current block among them: ``window / block`` blocks, as published.
        dense_len: a token reads everything before it while its sequence, up to itself, is not longer than this; 0 is
            always sparse. The published code asks for the length of the whole prompt, by which later tokens would
            change earlier rows; the two agree on prompts that are not longer, and in decoding.
    """

    kind: Literal["infllm_v2"] = "infllm_v2"
    block: int = Field(default=64, ge=1)
    length: int = Field(default=32, ge=1)
    stride: int = Field(default=16, ge=1)
    top_k: int = Field(default=64, ge=1)
    initial: int = Field(default=1, ge=0)
    window: int = Field(default=2048, ge=1)
    dense_len: int = Field(default=8192, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> InfLLMV2:
        if self.length % self.stride:
            raise ValueError(f"length {self.length} must be a multiple of stride {self.stride}")
        if self.block % self.stride:
            raise ValueError(f"block {self.block} must be a multiple of stride {self.stride}")
        if self.length > self.block:
            raise ValueError(f"length {self.length} exceeds block {self.block}: a block could be chosen by no window")
        if self.window % self.block:
            raise ValueError(f"window {self.window} must be a multiple of block {self.block}")
        if self.initial > self.top_k:
            raise ValueError(f"initial {self.initial} exceeds top_k {self.top_k}")
        return self

    @property
    def grid(self) -> Grid:
        """Where pooled windows and blocks lie."""
        return Grid(self.length, self.stride, self.block)

    @property
    def local(self) -> int:
        """Blocks of the window, the current one among them."""
        return self.window // self.block

    @property
    def blocks(self) -> int:
        """Blocks that a sparse query reads at most: 96 as published."""
        return self.top_k + self.local

    def clashes(self, kv: KV, context: int) -> Iterator[tuple[str, str, str]]:
        yield from super().clashes(kv, context)
        if kv.row().heads != kv.shape[1]:
            what = "infllm_v2 chooses per KV group, which would be each head in training and all heads in decoding"
            yield "kv", what, "Use kind: gqa"

    def build(self, width: int, kv: KV, numerics: Numerics) -> InfLLMV2Attention:
        return InfLLMV2Attention(self)

    def state(self, kv: KV) -> JointSpec:
        row = kv.row()
        return JointSpec.of(keys=row, pooled=BlockSpec((row.heads, row.k_dim), self.length, self.stride))

    def cost(self, width: int, kv: KV, at: At) -> Cost:
        """Scores of windows and of keys; a sparse step reads all pooled keys (spec sparse-attention 1.5)."""
        heads, groups, k_dim, v_dim = kv.shape
        dense = min(self.dense_len, at.tokens)
        sparse = selected_keys(at.tokens, self.block, self.blocks) - selected_keys(dense, self.block, self.blocks)
        keys = dense * (dense + 1) // 2 + sparse
        scored = self.grid.all_complete(at.tokens) - self.grid.all_complete(dense)
        return Cost(
            flops=2.0 * heads * ((k_dim + v_dim) * keys + k_dim * scored) / at.tokens,
            state_bytes=self.state(kv).nbytes(at.tokens, at.itemsize),
            read_bytes=self._read_bytes(kv, at),
            activation_bytes=at.itemsize * (heads + groups) * (k_dim + v_dim) + 4 * heads,
        )

    def _read_bytes(self, kv: KV, at: At) -> int:
        """Rows of the chosen blocks and pooled keys; a pooled window that this step completes is read once more."""
        row, last = kv.row(), at.tokens - 1
        complete = self.grid.complete(at.tokens)
        fresh = (complete - self.grid.complete(last)) * self.length * row.k_dim * at.itemsize
        sparse = at.tokens > self.dense_len
        rows = min(self.blocks - 1, last // self.block) * self.block + last % self.block + 1 if sparse else at.tokens
        pooled = 4 * complete * row.k_dim if sparse else 0
        return row.heads * (rows * (row.k_dim + row.v_dim) * at.itemsize + pooled + fresh)


class InfLLMV2Attention(SelectingAttention):
    """Read everything while the sequence is short; then pool, choose, and attend to what was chosen."""

    def __init__(self, spec: InfLLMV2):
        super().__init__()
        self.spec = spec

    def forward(
        self, heads: Heads, x_TD: Tensor, stream: Stream, scores: Scores, state: LayerState | None,
        chosen_THJ: Tensor | None = None,
    ) -> tuple[Tensor, Selection]:
        keys = pooled = None
        if isinstance(state, JointState):
            keys, pooled = state.part("keys", RowState), state.part("pooled", BlockState)
            keys.append(*heads.rows, stream)
        outputs, chosen = [heads.v_TGV.new_empty(0, heads.q_THK.shape[1], heads.v_TGV.shape[2])], []
        for own in sequences(heads, stream, keys, chosen_THJ):
            means_SGK = self._pooled(own, pooled)
            dense = self._dense(own)
            if dense:
                until = own.first + dense
                near = attend_last(own.q_THK[:dense], own.k_SGK[:until], own.v_SGV[:until], None, scores)
                outputs.append(near)
                chosen.append(self._everything(own, dense))
            if dense < len(own.q_THK):
                rest = own.after(dense)
                blocks_TGJ = choose_compressed(rest.q_THK, means_SGK, rest.first, self.spec.grid, scores, self._choose)
                blocks_TGJ = rest.recorded(blocks_TGJ, self.spec.block)
                far = attend_selected(rest.q_THK, own.k_SGK, own.v_SGV, blocks_TGJ, self.spec.block, scores)
                outputs.append(far[0])
                chosen.append(blocks_TGJ)
        return torch.cat(outputs), Selection(even(chosen), self.spec.block)

    @torch.no_grad()
    def _pooled(self, own: Sequence, pooled: BlockState | None) -> Tensor:
        """Mean keys of the complete windows, in fp32 (fp64)."""
        grid, tokens = self.spec.grid, len(own.k_SGK)

        def make(start: int, stop: int) -> Tensor:
            windows = grid.windows(own.k_SGK, tokens, start, stop)
            return windows.mean(1, dtype=torch.promote_types(windows.dtype, torch.float32))

        return make(0, grid.complete(tokens)) if pooled is None else pooled.close(own.index, tokens, make)

    def _choose(self, weights_TGS: Tensor, first: int) -> Tensor:
        spec = self.spec
        scores_TGM = spec.grid.touching(weights_TGS, first + len(weights_TGS)).amax(-1)
        return choose(scores_TGM, first, spec.block, spec.blocks, spec.local - 1, spec.initial)

    def _dense(self, own: Sequence) -> int:
        """First queries that read everything: those of a short sequence, unless a record says otherwise."""
        dense = min(max(0, self.spec.dense_len - own.first), len(own.q_THK))
        if own.chosen_THJ is None or not dense:
            return dense
        recorded_TGJ, all_TGJ = even([own.chosen_THJ[:dense], self._everything(own, dense)]).chunk(2)
        return dense if torch.equal(recorded_TGJ, all_TGJ) else 0

    def _everything(self, own: Sequence, count: int) -> Tensor:
        """Block numbers from 0 to the current one, of the first ``count`` queries."""
        current_T = torch.arange(own.first, own.first + count, device=own.q_THK.device) // self.spec.block
        block_M = torch.arange((own.first + count - 1) // self.spec.block + 1, device=current_T.device)
        blocks_TM = block_M.where(block_M <= current_T[:, None], -1)
        return blocks_TM[:, None].expand(-1, own.k_SGK.shape[1], -1)
