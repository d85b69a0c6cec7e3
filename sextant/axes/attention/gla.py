"""Gated linear attention (2312.06635): every key channel forgets at a rate that the token decides.

The decay is ``sigmoid(x W1 W2 + b)^(1 / temperature)`` through a low rank; queries are divided by the root of their
width; each head's output is normed with gains that the heads share, then gated by a swish.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sextant.axes.attention.base import Mixer
from sextant.axes.attention.recurrence import gated, recurrence_cost, walk
from sextant.axes.numerics import Numerics
from sextant.axes.stability import Linear, RMSNorm, Role, Values
from sextant.core.cost import At, Cost
from sextant.core.state import LayerState, RecurrentSpec
from sextant.core.stream import Stream


class GLA(Mixer):
    """``S_t = diag(a_t) S_{t-1} + k_t v_t^T``, ``o_t = q_t S_t``.

    Attributes:
        head_dim: K of queries and keys; the paper gives all heads together D / 2.
        value_dim: V; the paper gives all heads together D.
        rank: of the product that makes the decays.
        temperature: larger ones forget more slowly.
        norm: over each head's V channels.
        chunk: tokens that read each other without the state; changes the speed alone.
    """

    kind: Literal["gla"] = "gla"
    heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    value_dim: int = Field(ge=1)
    rank: int = Field(default=16, ge=1)
    temperature: float = Field(default=16.0, gt=0)
    norm: RMSNorm = RMSNorm(eps=1e-5)
    chunk: int = Field(default=64, ge=1)

    def build(self, width: int, numerics: Numerics) -> GLAModule:
        return GLAModule(self, width, numerics)

    def state(self) -> RecurrentSpec:
        return RecurrentSpec((self.heads, self.head_dim, self.value_dim))

    def cost(self, width: int, at: At) -> Cost:
        """Parameters ``D (2 H K + 3 H V) + R (D + H K) + H K + V``; the rest as :func:`recurrence_cost` counts."""
        keys, values = self.heads * self.head_dim, self.heads * self.value_dim
        matrices = Cost.of_matrix(width, 2 * keys + 2 * values, at) + Cost.of_matrix(values, width, at)
        decays = Cost.of_matrix(width, self.rank, at, keep_input=False) + Cost.of_matrix(self.rank, keys, at)
        vectors = Cost(keys + self.value_dim, keys + self.value_dim)
        kept = Cost(activation_bytes=at.itemsize * (2 * keys + 3 * values) + 4 * (3 * keys + 2 * values))
        core = recurrence_cost(self.heads, self.head_dim, self.value_dim, self.chunk, at)
        return matrices + decays + vectors + kept + core


class GLAModule(nn.Module):
    """``[T, D] -> [T, D]``; decays are fp32 from their logits on."""

    def __init__(self, spec: GLA, width: int, numerics: Numerics):
        super().__init__()
        self.spec, self.numerics = spec, numerics
        keys, values = spec.heads * spec.head_dim, spec.heads * spec.value_dim
        self.q = Linear(width, keys, Role.ATTENTION_IN)
        self.k = Linear(width, keys, Role.ATTENTION_IN)
        self.v = Linear(width, values, Role.ATTENTION_IN, values=Values())
        self.gate = Linear(width, values, Role.ATTENTION_IN)
        self.decay_down = Linear(width, spec.rank, Role.ATTENTION_IN)
        self.decay_up = Linear(spec.rank, keys, Role.ATTENTION_IN, bias=True)
        self.o = Linear(values, width, Role.ATTENTION_OUT)
        self.norm = spec.norm.build(spec.value_dim)

    def forward(self, x_TD: Tensor, stream: Stream, state: LayerState | None) -> Tensor:
        x_TD = self.numerics.lower(x_TD)
        q, k, v, decay = (
            rows.unflatten(-1, (self.spec.heads, -1))
            for rows in (self.q(x_TD), self.k(x_TD), self.v(x_TD), self._log_decay(x_TD))
        )
        o_THV = walk((q * self.spec.head_dim**-0.5, k, v, decay), stream, state, gated(self.spec.chunk))
        return self.o(self.numerics.lower(self.norm(o_THV).flatten(1) * F.silu(self.gate(x_TD))))

    def _log_decay(self, x_TD: Tensor) -> Tensor:
        logits = self.decay_up(self.decay_down(x_TD))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.logsigmoid(logits) / self.spec.temperature
