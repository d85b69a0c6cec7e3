"""Learned sinks (gpt-oss): each head has a logit of its own in the softmax's denominator, so that it may rest.

The sink is one more part of the attention, with ``o = 0`` and a log-sum-exp of ``b_h``. Merged with the part that looks
at keys it leaves ``o * sigmoid(lse - b_h)`` (spec sparse-attention 1.2, 11).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sextant.axes.attention.static import Reading, StaticAttention, StaticPattern
from sextant.axes.kv.base import KV
from sextant.axes.numerics import Numerics
from sextant.axes.stability import Role
from sextant.core.cost import At, Cost
from sextant.core.stream import Stream
from sextant.kernels.attention import Reach, Span, attend_with_lse


class LearnedSink(StaticPattern):
    """The last ``window`` keys (None: all), and one learned logit for each query head. H parameters."""

    kind: Literal["learned_sink"] = "learned_sink"
    window: int | None = Field(default=None, ge=1)

    def reaches(self, kv: KV) -> tuple[Reach, ...]:
        return (Span(self.window),) * kv.shape[1]

    def build(self, width: int, kv: KV, numerics: Numerics) -> SinkAttention:
        return SinkAttention(self.reaches(kv), self.stores(kv), kv.shape[0])

    def cost(self, width: int, kv: KV, at: At) -> Cost:
        cost = super().cost(width, kv, at)
        return replace(cost, params=kv.shape[0], active_params=kv.shape[0])

    def clashes(self, kv: KV, context: int) -> Iterator[tuple[str, str, str]]:
        if self.window is not None and self.window > context:
            what = f"window {self.window} exceeds the context {context}"
            yield "attention.window", what, "Leave window out, or use a smaller one or a longer context"


class SinkAttention(StaticAttention):
    """Attention with ``sinks_H``, fp32."""

    roles = {"sinks_H": Role.BIAS}

    def __init__(self, reaches: tuple[Reach, ...], stores: dict[tuple[int | None, int], list[int]], heads: int):
        super().__init__(reaches, stores)
        self.sinks_H = nn.Parameter(torch.empty(heads))

    def attend(self, reading: Reading, stream: Stream) -> Tensor:
        o_THV, lse_HT = attend_with_lse(reading.q_THK, reading.keys, stream, reading.reach, reading.scores)
        looks_HT = torch.sigmoid(lse_HT - self.sinks_H.to(lse_HT.dtype)[:, None])
        return (o_THV * looks_HT.t()[..., None]).to(o_THV.dtype)
