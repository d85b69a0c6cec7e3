"""A dense feed-forward layer: SwiGLU, GELU and its gated forms, squared ReLU."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from sextant.axes.capacity.activation import Activation, activate, is_gated
from sextant.axes.capacity.base import FeedForward
from sextant.axes.numerics import Numerics
from sextant.axes.stability import Joined, Linear, Role
from sextant.core.cost import At, Cost
from sextant.core.stream import Stream


class Dense(FeedForward):
    """``y = (act(x Wg) * (x Wu)) Wd`` when gated, ``act(x Wu) Wd`` otherwise; ``hidden`` is the width of one half."""

    kind: Literal["dense"] = "dense"
    hidden: int = Field(ge=1)
    activation: Activation = "swiglu"

    def build(self, width: int, numerics: Numerics) -> DenseModule:
        return DenseModule(self, width, numerics)

    def cost(self, width: int, at: At) -> Cost:
        halves = 2 if is_gated(self.activation) else 1
        cost = Cost.of_matrix(width, halves * self.hidden, at) + Cost.of_matrix(self.hidden, width, at)
        return cost + Cost(activation_bytes=at.itemsize * halves * self.hidden)


class DenseModule(nn.Module):
    """``[T, D] -> [T, D]`` and no record."""

    def __init__(self, spec: Dense, width: int, numerics: Numerics):
        super().__init__()
        self.spec, self.numerics = spec, numerics
        self.gate = Linear(width, spec.hidden, Role.FF_IN) if is_gated(spec.activation) else None
        self.up = Linear(width, spec.hidden, Role.FF_IN)
        self.down = Linear(spec.hidden, width, Role.FF_OUT)
        self.joined: Joined | None = None

    def join(self) -> None:
        """Gate and value by one product from now on."""
        if self.gate is not None:
            self.joined = Joined((self.gate, self.up))

    def forward(self, x_TD: Tensor, stream: Stream) -> tuple[Tensor, None]:
        x_TD = self.numerics.lower(x_TD)
        if self.gate is None:
            return self.down(activate(self.spec.activation, self.up(x_TD))), None
        gate, value = (self.gate(x_TD), self.up(x_TD)) if self.joined is None else self.joined(x_TD)
        return self.down(activate(self.spec.activation, gate, value)), None
