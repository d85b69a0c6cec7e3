"""Lightning attention, the linear mixer of MiniMax-01 (2501.08313; spec minimax-01, section 3).

One SiLU over q, k and v; a recurrence whose decay is fixed per head and weakens with the layer's depth, the only sign
of position; a norm over all heads together; then a sigmoid gate from the layer's input. No scale, no normaliser. Decays
are ALiBi's slopes times :func:`fade`.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sextant.axes.attention.base import Mixer
from sextant.axes.attention.recurrence import decayed, recurrence_cost, walk
from sextant.axes.kv.position import alibi_slopes
from sextant.axes.numerics import Numerics
from sextant.axes.stability import Linear, RMSNorm, Role, Values
from sextant.core.cost import At, Cost
from sextant.core.state import LayerState, RecurrentSpec
from sextant.core.stream import Stream


def fade(layer: int, layers: int) -> float:
    """How much of the slopes is left in layer 0, 1, ... of all ``layers``, softmax layers counted: from 1 down to 1e-5,
    so that early layers are local and late ones remember (spec minimax-01, section 3.2).
    """
    return 1 - layer / max(1, layers - 1) + 1e-5


class Lightning(Mixer):
    """``S_t = exp(-slope) S_{t-1} + k_t v_t^T``, ``o_t = q_t S_t``, then norm, gate, projection.

    Attributes:
        fade: factor on the slopes ``2^(-8 h / H)``; the layer's own (:func:`fade`), or 1 in every layer.
        norm: over the H V channels of all heads.
        chunk: tokens whose scores are formed at once; changes the speed alone.
    """

    kind: Literal["lightning"] = "lightning"
    heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    fade: float = Field(default=1.0, gt=0)
    norm: RMSNorm = RMSNorm()
    chunk: int = Field(default=64, ge=1)

    @property
    def inner(self) -> int:
        """Width of all heads together."""
        return self.heads * self.head_dim

    def build(self, width: int, numerics: Numerics) -> LightningModule:
        return LightningModule(self, width, numerics)

    def state(self) -> RecurrentSpec:
        return RecurrentSpec((self.heads, self.head_dim, self.head_dim))

    def cost(self, width: int, at: At) -> Cost:
        """Parameters ``5 D A + A`` with A = :attr:`inner`; the recurrence as :func:`recurrence_cost` counts."""
        matrices = Cost.of_matrix(width, 4 * self.inner, at) + Cost.of_matrix(self.inner, width, at)
        kept = Cost(activation_bytes=7 * at.itemsize * self.inner + 4 * self.inner)
        core = recurrence_cost(self.heads, self.head_dim, self.head_dim, self.chunk, at)
        return matrices + kept + core + self.norm.cost(self.inner, at)


class LightningModule(nn.Module):
    """``[T, D] -> [T, D]``. Rows of ``qkv`` go by head: q, k and v of head 0, then of head 1, ..."""

    log_decay_H: Tensor

    def __init__(self, spec: Lightning, width: int, numerics: Numerics):
        super().__init__()
        self.spec, self.numerics = spec, numerics
        v = Values(3 * spec.head_dim, 2 * spec.head_dim, 3 * spec.head_dim)
        self.qkv = Linear(width, 3 * spec.inner, Role.ATTENTION_IN, values=v, joint=3)
        self.gate = Linear(width, spec.inner, Role.ATTENTION_IN)
        self.o = Linear(spec.inner, width, Role.ATTENTION_OUT)
        self.norm = spec.norm.build(spec.inner)
        self.register_buffer("log_decay_H", -spec.fade * alibi_slopes(spec.heads), persistent=False)

    def forward(self, x_TD: Tensor, stream: Stream, state: LayerState | None) -> Tensor:
        x_TD = self.numerics.lower(x_TD)
        qkv = F.silu(self.qkv(x_TD)).unflatten(-1, (self.spec.heads, 3, self.spec.head_dim))
        o_THV = walk(qkv.unbind(-2), stream, state, decayed(self.log_decay_H, self.spec.chunk))
        gated = self.norm(o_THV.flatten(1)) * self.gate(x_TD).sigmoid()
        return self.o(self.numerics.lower(gated))
