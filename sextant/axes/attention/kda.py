"""Kimi delta attention, the linear mixer of Kimi Linear (2510.26692; spec minimax-01, section 16).

Gated DeltaNet with a decay for every key channel. Decays and output gates come through a rank of one head's width; the
gate is a sigmoid.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sextant.axes.attention.base import Mixer
from sextant.axes.attention.delta import DeltaShape, Forget, forget_cost, wide
from sextant.axes.numerics import Numerics
from sextant.axes.stability import Linear, RMSNorm, Role, Values
from sextant.core.cost import At, Cost
from sextant.core.state import JointSpec, LayerState
from sextant.core.stream import Stream


class KDA(Mixer):
    """``S_t = (I - b_t k_t k_t^T) diag(a_t) S_{t-1} + b_t k_t v_t^T``, ``o_t = q_t S_t``.

    Attributes:
        head_dim: of queries, keys and values alike.
        taps: of the convolution, the token's own included.
        norm: over each head's channels.
        chunk: tokens whose corrections are solved for at once; changes the speed alone.
    """

    kind: Literal["kda"] = "kda"
    heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    taps: int = Field(default=4, ge=2)
    norm: RMSNorm = RMSNorm(eps=1e-5)
    chunk: int = Field(default=64, ge=1)

    @property
    def inner(self) -> int:
        """Width of all heads together."""
        return self.heads * self.head_dim

    @property
    def shape(self) -> DeltaShape:
        """What the recurrence needs to know."""
        return DeltaShape(self.heads, self.heads, self.head_dim, self.head_dim, self.taps, self.chunk)

    def build(self, width: int, numerics: Numerics) -> KDAModule:
        return KDAModule(self, width, numerics)

    def state(self) -> JointSpec:
        return self.shape.state()

    def cost(self, width: int, at: At) -> Cost:
        """Parameters ``D (4 A + 2 K + H) + 2 K A + 3 taps A + H + A + K`` with A = :attr:`inner`; FLOPs as
        :meth:`DeltaShape.cost` counts.
        """
        matrices = Cost.of_matrix(width, 3 * self.inner + 2 * self.head_dim + self.heads, at)
        matrices += Cost.of_matrix(self.inner, width, at) + 2 * Cost.of_matrix(self.head_dim, self.inner, at)
        # in fp32: the gate, and the output before and after its norm
        kept = Cost(activation_bytes=4 * 3 * self.inner)
        parts = self.shape.cost(at) + forget_cost(self.heads, self.head_dim) + self.norm.cost(self.head_dim, at)
        return matrices + kept + parts


class KDAModule(nn.Module):
    """``[T, D] -> [T, D]``."""

    def __init__(self, spec: KDA, width: int, numerics: Numerics):
        super().__init__()
        self.spec, self.numerics = spec, numerics
        self.q = Linear(width, spec.inner, Role.ATTENTION_IN)
        self.k = Linear(width, spec.inner, Role.ATTENTION_IN)
        self.v = Linear(width, spec.inner, Role.ATTENTION_IN, values=Values())
        self.beta = Linear(width, spec.heads, Role.ATTENTION_IN)
        self.decay_down = Linear(width, spec.head_dim, Role.ATTENTION_IN)
        self.decay_up = Linear(spec.head_dim, spec.inner, Role.ATTENTION_IN)
        self.gate_down = Linear(width, spec.head_dim, Role.ATTENTION_IN)
        self.gate_up = Linear(spec.head_dim, spec.inner, Role.ATTENTION_IN)
        self.forget = Forget(spec.heads, spec.head_dim)
        self.core = spec.shape.build()
        self.norm = spec.norm.build(spec.head_dim)
        self.o = Linear(spec.inner, width, Role.ATTENTION_OUT)

    def forward(self, x_TD: Tensor, stream: Stream, state: LayerState | None) -> Tensor:
        x_TD = self.numerics.lower(x_TD)
        qkv = torch.cat((self.q(x_TD), self.k(x_TD), self.v(x_TD)), dim=-1)
        log_decay = self.forget(self.decay_up(self.decay_down(x_TD)))
        o_THV = self.core(qkv, log_decay, wide(self.beta(x_TD)).sigmoid(), stream, state)
        gate = wide(self.gate_up(self.gate_down(x_TD))).sigmoid()
        return self.o(self.numerics.lower(self.norm(o_THV).flatten(1) * gate))
