"""Gated DeltaNet, the linear mixer of Qwen3-Next (2412.06464; spec minimax-01, section 16).

A short convolution with SiLU over q, k and v; queries and keys of length 1; a state that decays per head and corrects
what it answers to each key; a norm of each head's output, gated by SiLU.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sextant.axes.attention.base import Mixer
from sextant.axes.attention.delta import DeltaShape, Forget, forget_cost, wide
from sextant.axes.numerics import Numerics
from sextant.axes.stability import Linear, RMSNorm, Role, Values
from sextant.core.cost import At, Cost
from sextant.core.state import JointSpec, LayerState
from sextant.core.stream import Stream


class GatedDelta(Mixer):
    """``S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T``, ``o_t = q_t S_t``, with a and b per head and token.

    Attributes:
        key_heads: G heads of queries and keys, each of which serves H / G heads of values.
        value_heads: H.
        head_dim: K of queries and keys.
        value_dim: V.
        taps: of the convolution, the token's own included.
        norm: over each head's V channels.
        chunk: tokens whose corrections are solved for at once; changes the speed alone.
    """

    kind: Literal["gated_delta"] = "gated_delta"
    key_heads: int = Field(ge=1)
    value_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    value_dim: int = Field(ge=1)
    taps: int = Field(default=4, ge=2)
    norm: RMSNorm = RMSNorm()
    chunk: int = Field(default=64, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> GatedDelta:
        if self.value_heads % self.key_heads:
            raise ValueError(f"value_heads {self.value_heads} must be a multiple of key_heads {self.key_heads}")
        return self

    @property
    def shape(self) -> DeltaShape:
        """What the recurrence needs to know."""
        return DeltaShape(self.key_heads, self.value_heads, self.head_dim, self.value_dim, self.taps, self.chunk)

    def build(self, width: int, numerics: Numerics) -> GatedDeltaModule:
        return GatedDeltaModule(self, width, numerics)

    def state(self) -> JointSpec:
        return self.shape.state()

    def cost(self, width: int, at: At) -> Cost:
        """Parameters ``D (2 G K + 3 H V + 2 H) + taps (2 G K + H V) + 2 H + V``; FLOPs as :meth:`DeltaShape.cost`."""
        keys, _, values = self.shape.parts
        matrices = Cost.of_matrix(width, 2 * (keys + values + self.value_heads), at)
        matrices += Cost.of_matrix(values, width, at)
        # in fp32: the gate's logits, the gate, and the output before and after its norm
        kept = Cost(activation_bytes=4 * 4 * values)
        parts = self.shape.cost(at) + forget_cost(self.value_heads, 1) + self.norm.cost(self.value_dim, at)
        return matrices + kept + parts


class GatedDeltaModule(nn.Module):
    """``[T, D] -> [T, D]``. Rows of ``qkvz`` go by key head: its q, k, and the v and gates of the heads that it serves;
    those of ``ba`` likewise: its betas, then its decays.
    """

    def __init__(self, spec: GatedDelta, width: int, numerics: Numerics):
        super().__init__()
        self.spec, self.numerics = spec, numerics
        keys, _, values = spec.shape.parts
        served = values // spec.key_heads
        v = Values(2 * (spec.head_dim + served), 2 * spec.head_dim, 2 * spec.head_dim + served)
        self.qkvz = Linear(width, 2 * (keys + values), Role.ATTENTION_IN, values=v)
        self.ba = Linear(width, 2 * spec.value_heads, Role.ATTENTION_IN)
        self.forget = Forget(spec.value_heads, 1)
        self.core = spec.shape.build()
        self.norm = spec.norm.build(spec.value_dim)
        self.o = Linear(values, width, Role.ATTENTION_OUT)

    def forward(self, x_TD: Tensor, stream: Stream, state: LayerState | None) -> Tensor:
        x_TD, spec = self.numerics.lower(x_TD), self.spec
        served = spec.value_heads // spec.key_heads * spec.value_dim
        by_key_head = self.qkvz(x_TD).unflatten(-1, (spec.key_heads, -1))
        *qkv, z = by_key_head.split((spec.head_dim, spec.head_dim, served, served), dim=-1)
        b, a = (part.flatten(1) for part in self.ba(x_TD).unflatten(-1, (spec.key_heads, 2, -1)).unbind(-2))
        qkv = torch.cat([part.flatten(1) for part in qkv], dim=-1)
        o_THV = self.core(qkv, self.forget(a), wide(b).sigmoid(), stream, state)
        gated = self.norm(o_THV).flatten(1) * F.silu(wide(z.flatten(1)))
        return self.o(self.numerics.lower(gated))
