"""Retention, RetNet's linear mixer (2307.08621): a fixed decay per head, rotated queries and keys, a norm per head.

The paper's three normalisations of scores are left out: each is a factor on a head's output, which the norm that
follows takes away again (its section 2.1).
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sextant.axes.attention.base import Mixer
from sextant.axes.attention.recurrence import decayed, recurrence_cost, walk
from sextant.axes.kv.position import NoPE, RoPE
from sextant.axes.numerics import Numerics
from sextant.axes.stability import Linear, Role, Values
from sextant.core.cost import At, Cost
from sextant.core.state import LayerState, RecurrentSpec
from sextant.core.stream import Stream


class RetNet(Mixer):
    """``S_t = gamma_h S_{t-1} + k_t v_t^T`` with ``gamma_h = 1 - 2^(-5 - h)``, ``o_t = q_t S_t``; swish gate.

    Attributes:
        head_dim: K of queries and keys; keys are divided by its root.
        value_dim: V, twice K in the paper.
        position: xPos without its decay, which ``gamma`` replaces, is the interleaved rotation.
        eps: of the norm of each head's V channels, mean removed, without gains.
        chunk: tokens whose scores are formed at once; changes the speed alone.
    """

    kind: Literal["retnet"] = "retnet"
    heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    value_dim: int = Field(ge=1)
    position: Annotated[RoPE | NoPE, Field(discriminator="kind")] = RoPE(layout="interleaved")
    eps: float = Field(default=1e-6, gt=0)
    chunk: int = Field(default=64, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> RetNet:
        if isinstance(self.position, RoPE):
            self.position.rotary_dim(self.head_dim)
        return self

    def build(self, width: int, numerics: Numerics) -> RetNetModule:
        return RetNetModule(self, width, numerics)

    def state(self) -> RecurrentSpec:
        return RecurrentSpec((self.heads, self.head_dim, self.value_dim))

    def cost(self, width: int, at: At) -> Cost:
        """Parameters ``D (2 H K + 3 H V)``; the recurrence as :func:`recurrence_cost` counts."""
        keys, values = self.heads * self.head_dim, self.heads * self.value_dim
        matrices = Cost.of_matrix(width, 2 * keys + 2 * values, at) + Cost.of_matrix(values, width, at)
        kept = Cost(activation_bytes=at.itemsize * (2 * keys + 3 * values) + 8 * values)
        return matrices + kept + recurrence_cost(self.heads, self.head_dim, self.value_dim, self.chunk, at)


class RetNetModule(nn.Module):
    """``[T, D] -> [T, D]``."""

    log_decay_H: Tensor

    def __init__(self, spec: RetNet, width: int, numerics: Numerics):
        super().__init__()
        self.spec, self.numerics = spec, numerics
        keys, values = spec.heads * spec.head_dim, spec.heads * spec.value_dim
        self.q = Linear(width, keys, Role.ATTENTION_IN)
        self.k = Linear(width, keys, Role.ATTENTION_IN)
        self.v = Linear(width, values, Role.ATTENTION_IN, values=Values())
        self.gate = Linear(width, values, Role.ATTENTION_IN)
        self.o = Linear(values, width, Role.ATTENTION_OUT)
        self.position = spec.position.build(spec.heads, spec.head_dim)
        log_decay_H = torch.log1p(-(2.0 ** -(5.0 + torch.arange(spec.heads))))
        self.register_buffer("log_decay_H", log_decay_H, persistent=False)

    def forward(self, x_TD: Tensor, stream: Stream, state: LayerState | None) -> Tensor:
        x_TD = self.numerics.lower(x_TD)
        q, k, v = (projection(x_TD).unflatten(-1, (self.spec.heads, -1)) for projection in (self.q, self.k, self.v))
        q, k = self.position(q, k * self.spec.head_dim**-0.5, stream)
        o_THV = walk((q, k, v), stream, state, decayed(self.log_decay_H, self.spec.chunk))
        normed_THV = F.layer_norm(o_THV, o_THV.shape[-1:], eps=self.spec.eps)
        return self.o(self.numerics.lower(normed_THV.flatten(1) * F.silu(self.gate(x_TD))))
