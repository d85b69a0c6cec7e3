"""Where the norms stand around a sublayer, and what its branch starts with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sextant.axes.stability.norm import AnyNorm, RMSNorm
from sextant.core.cost import At, Cost
from sextant.core.spec import Spec

Sublayer = Callable[[Tensor], tuple[Tensor, Any]]
"""What a branch wraps: rows ``[T, D]`` in, rows and an optional record out."""


class _Placement(Spec):
    norm: AnyNorm = RMSNorm()
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @property
    def norms(self) -> int:
        """Norms per sublayer."""
        return 1

    def cost(self, width: int, at: At) -> Cost:
        """Of one sublayer's norms."""
        return self.norms * self.norm.cost(width, at)


class PreNorm(_Placement):
    """``x + f(norm(x))`` (GPT-2, Llama)."""

    kind: Literal["pre"] = "pre"

    def build(self, width: int, gain: float = 1.0) -> nn.Module:
        return PreBranch(self, width)


class PostNorm(_Placement):
    """``norm(x + f(x))`` (the original transformer)."""

    kind: Literal["post"] = "post"

    def build(self, width: int, gain: float = 1.0) -> nn.Module:
        return PostBranch(self, width)


class SandwichNorm(_Placement):
    """``x + norm_out(f(norm_in(x)))`` (MAI-Base-1, Gemma 3).

    ``attention_gain`` is what the gain of the attention's output norm starts at. 0 turns attention off at step 0, so
    that routers see distinct tokens: the gain is zeroed, never the projection, because a norm of an exact zero has a
    gradient of ``1/sqrt(eps)``.
    """

    kind: Literal["sandwich"] = "sandwich"
    attention_gain: float = 1.0

    @property
    def norms(self) -> int:
        return 2

    def build(self, width: int, gain: float = 1.0) -> nn.Module:
        return SandwichBranch(self, width, gain)


class DeepNorm(_Placement):
    """``alpha u + beta f(u)`` with ``u = norm(x)``: a post-norm whose norm stands at the next sublayer's entry, so that
    the model's own norms are the first and the last (MiniMax-01; spec minimax-01, section 5.1).

    Attributes:
        alpha: factor on the normed row; ``(2 L) ** 0.25`` in L layers (2203.00555).
        beta: factor on the branch; the paper's ``(8 L) ** -0.25`` is a gain at the start, not this.
    """

    kind: Literal["deep"] = "deep"
    alpha: float = Field(default=1.0, gt=0)
    beta: float = Field(default=1.0, gt=0)

    def build(self, width: int, gain: float = 1.0) -> nn.Module:
        return DeepBranch(self, width)


AnyResidual = Annotated[PreNorm | PostNorm | SandwichNorm | DeepNorm, Field(discriminator="kind")]


class PreBranch(nn.Module):
    def __init__(self, spec: PreNorm, width: int):
        super().__init__()
        self.dropout = spec.dropout
        self.norm = spec.norm.build(width)

    def forward(self, x_TD: Tensor, f: Sublayer) -> tuple[Tensor, Any]:
        y_TD, record = f(self.norm(x_TD))
        return x_TD + F.dropout(y_TD, self.dropout, self.training), record


class PostBranch(nn.Module):
    def __init__(self, spec: PostNorm, width: int):
        super().__init__()
        self.dropout = spec.dropout
        self.norm = spec.norm.build(width)

    def forward(self, x_TD: Tensor, f: Sublayer) -> tuple[Tensor, Any]:
        y_TD, record = f(x_TD)
        return self.norm(x_TD + F.dropout(y_TD, self.dropout, self.training)), record


class SandwichBranch(nn.Module):
    def __init__(self, spec: SandwichNorm, width: int, gain: float):
        super().__init__()
        self.dropout = spec.dropout
        self.norm = spec.norm.build(width)
        self.norm_out = spec.norm.build(width)
        self.gain = gain

    def forward(self, x_TD: Tensor, f: Sublayer) -> tuple[Tensor, Any]:
        y_TD, record = f(self.norm(x_TD))
        return x_TD + F.dropout(self.norm_out(y_TD), self.dropout, self.training), record


class DeepBranch(nn.Module):
    def __init__(self, spec: DeepNorm, width: int):
        super().__init__()
        self.dropout, self.alpha, self.beta = spec.dropout, spec.alpha, spec.beta
        self.norm = spec.norm.build(width)

    def forward(self, x_TD: Tensor, f: Sublayer) -> tuple[Tensor, Any]:
        u_TD = self.norm(x_TD)
        y_TD, record = f(u_TD)
        return self.alpha * u_TD + self.beta * F.dropout(y_TD, self.dropout, self.training), record
