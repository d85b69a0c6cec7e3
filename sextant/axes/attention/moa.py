"""MoA (2406.14909): every KV group has a span of its own, which grows with the length: ``S = alpha + beta N`` tokens,
of which the first few are sinks and the rest a window.

Published spans are static at a given input length: with ``length`` set they are those of that length, and a group keeps
a ring of its own span. Without it the span of a query follows its place, so that a sequence may grow for ever and every
way of feeding it gives the same rows. :mod:`sextant.lab.moa` finds the numbers. Spec sparse-attention 9.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sextant.axes.attention.static import StaticPattern, fading
from sextant.axes.kv.base import KV
from sextant.kernels.attention import Reach, Span
from sextant.kernels.attention.span import causal


class MoA(StaticPattern):
    """Spans ``alpha + beta N`` by KV group, rounded up to whole blocks.

    Attributes:
        alpha, beta: tokens, and tokens per token of length; one of each for every KV group.
        sinks: how many of a span's tokens are the first of the sequence; the rest, at least one block, are the last.
        length: N, the input length that the spans are made for; None lets N be the place of the query.
    """

    kind: Literal["moa"] = "moa"
    alpha: tuple[int, ...] = Field(min_length=1)
    beta: tuple[float, ...] = Field(min_length=1)
    sinks: int = Field(default=64, ge=0)
    block: int = Field(default=64, ge=1)
    length: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> MoA:
        if len(self.alpha) != len(self.beta):
            raise ValueError(f"{len(self.alpha)} values of alpha and {len(self.beta)} of beta")
        if min(self.alpha) < 0 or min(self.beta) < 0:
            raise ValueError("alpha and beta must not be negative")
        return self

    def reaches(self, kv: KV) -> tuple[Reach, ...]:
        elastic = [Elastic(a, b, self.sinks, self.block) for a, b in zip(self.alpha, self.beta, strict=True)]
        if self.length is None:
            return tuple(elastic)
        place = torch.tensor(self.length - 1, device="cpu")  # a number is wanted, also under the meta device
        return tuple(Span(int(reach.window(place)), self.sinks) for reach in elastic)

    def clashes(self, kv: KV, context: int) -> Iterator[tuple[str, str, str]]:
        yield from fading(kv, "sinks", self.sinks)
        if len(self.alpha) != kv.shape[1]:
            what = f"{len(self.alpha)} spans for {kv.shape[1]} KV heads"
            yield "attention.alpha", what, "Give one alpha and one beta for each KV head"


@dataclass(frozen=True)
class Elastic(Reach):
    """Sinks and a window that grows with the query's place."""

    alpha: int
    beta: float
    sinks: int
    block: int

    def window(self, t_T: Tensor) -> Tensor:
        """int64: tokens of the window of the query at each place, whole blocks with the sinks, and at least one."""
        span_T = self.alpha + self.beta * (t_T + 1).double()
        blocks_T = torch.ceil(span_T / self.block).long()
        return (blocks_T * self.block - self.sinks).clamp(min=self.block)

    def visible(self, q_T: Tensor, k_S: Tensor) -> Tensor:
        q, k, seen = causal(q_T, k_S)
        return seen & ((q - k < self.window(q)) | (k < self.sinks))

    def keys(self, t_T: Tensor) -> Tensor:
        return torch.minimum(t_T + 1, self.window(t_T) + self.sinks)

    def may_meet(self, q_first: Tensor, q_last: Tensor, k_first: Tensor, k_last: Tensor) -> Tensor:
        near = q_first - k_last < self.window(q_last)
        return (k_first <= q_last) & (near | (k_first < self.sinks))
