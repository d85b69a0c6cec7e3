"""Grouped-query attention, with multi-head (G = H) and multi-query (G = 1) attention as its ends.

Query head h reads KV head ``h // (H / G)``. The head width is free of the model width: H·K need not be D.
MAI-Base-1 section 4.4; 1706.03762, 1911.02150, 2305.13245.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from sextant.axes.kv.base import KV, Heads, Projections
from sextant.axes.kv.position import AnyPosition, RoPE
from sextant.axes.numerics import Numerics
from sextant.axes.stability import AnyNorm, Joined, Linear, Role, Values
from sextant.core.cost import At, Cost
from sextant.core.stream import Stream
from sextant.kernels.attention import Scores


class GQA(KV):
    """H query heads over G key/value heads.

    Attributes:
        qk_norm: norm of queries and keys before the position code; bounds the scores.
        qk_norm_over: the channels of each head by itself, or those of all heads at once (OLMoE).
        clip: queries, keys and values are clipped to this size as projected (DBRX).
        scale: what scores are multiplied by; None is ``head_dim ** -0.5``.
        v_head_dim: width of a value; None is ``head_dim``.
    """

    kind: Literal["gqa"] = "gqa"
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    v_head_dim: int | None = Field(default=None, ge=1)
    position: AnyPosition = RoPE()
    qk_norm: AnyNorm | None = None
    qk_norm_over: Literal["head", "all"] = "head"
    clip: float | None = Field(default=None, gt=0)
    scale: float | None = Field(default=None, gt=0)
    bias: bool = False

    @model_validator(mode="after")
    def _fits(self) -> GQA:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads}")
        if isinstance(self.position, RoPE):
            self.position.rotary_dim(self.head_dim)
        return self

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.heads, self.kv_heads, self.head_dim, self.v_head_dim or self.head_dim

    @property
    def norm_widths(self) -> tuple[int, int]:
        """Channels under one norm of queries, and of keys."""
        by_head = self.qk_norm_over == "head"
        return (1 if by_head else self.heads) * self.head_dim, (1 if by_head else self.kv_heads) * self.head_dim

    def build(self, width: int, numerics: Numerics) -> GQAModule:
        return GQAModule(self, width, numerics)

    def cost(self, width: int, at: At) -> Cost:
        heads, groups, k_dim, v_dim = self.shape
        q_k_v = heads * k_dim + groups * (k_dim + v_dim)
        cost = Cost.of_matrix(width, q_k_v, at) + Cost.of_matrix(heads * v_dim, width, at, keep_input=False)
        if self.bias:
            cost += Cost(q_k_v, q_k_v)
        if self.qk_norm is not None:
            cost += sum((self.qk_norm.cost(channels, at) for channels in self.norm_widths), start=Cost())
        return cost


class GQAModule(Projections):
    """Projections of one layer."""

    def __init__(self, spec: GQA, width: int, numerics: Numerics):
        super().__init__()
        self.spec, self.numerics = spec, numerics
        heads, groups, k_dim, v_dim = spec.shape
        self.q = Linear(width, heads * k_dim, Role.ATTENTION_IN, spec.bias)
        self.k = Linear(width, groups * k_dim, Role.ATTENTION_IN, spec.bias)
        self.v = Linear(width, groups * v_dim, Role.ATTENTION_IN, spec.bias, values=Values())
        self.o = Linear(heads * v_dim, width, Role.ATTENTION_OUT)
        self.joined: Joined | None = None
        q_width, k_width = spec.norm_widths
        self.q_norm = spec.qk_norm.build(q_width) if spec.qk_norm else None
        self.k_norm = spec.qk_norm.build(k_width) if spec.qk_norm else None
        self.position = spec.position.build(spec.heads, spec.head_dim)

    def join(self) -> None:
        """Queries, keys and values by one product from now on."""
        self.joined = Joined((self.q, self.k, self.v))

    @property
    def scores(self) -> Scores:
        """Scale and ALiBi slopes."""
        scale = self.spec.scale or self.spec.head_dim**-0.5
        return Scores(scale, self.position.slopes_H)

    def project(self, x_TD: Tensor, stream: Stream, reads_state: bool = False) -> Heads:
        """Queries of H heads, keys and values of G heads."""
        x_TD = self.numerics.lower(x_TD)
        heads, groups, _, _ = self.spec.shape
        parts = (self.q(x_TD), self.k(x_TD), self.v(x_TD)) if self.joined is None else self.joined(x_TD)
        if (clip := self.spec.clip) is not None:
            parts = [part.clamp(-clip, clip) for part in parts]
        q, k, v = (part.unflatten(-1, (n, -1)) for part, n in zip(parts, (heads, groups, groups), strict=True))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._normed(self.q_norm, q), self._normed(self.k_norm, k)
        turned_q, turned_k = self.position(q, k, stream)
        return Heads(turned_q.to(v.dtype), turned_k.to(v.dtype), v, q, k)

    def _normed(self, norm: nn.Module, rows_THK: Tensor) -> Tensor:
        return norm(rows_THK) if self.spec.qk_norm_over == "head" else norm(rows_THK.flatten(1)).view_as(rows_THK)

    def output(self, o_THV: Tensor, heads: Heads) -> Tensor:
        """``[T, H, V] -> [T, D]``."""
        return self.o(o_THV.flatten(1))
