"""A mixture of experts: router, capacity rule, dispatch, experts, combine, and experts that every token shares.

MAI-Base-1 sections 6 to 8; Mixtral 2401.04088; fine-grained and shared experts 2401.06066. The router sees the fp32
row; copies go to their experts sorted and in a fixed order; the combine is fp32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from sextant.axes.capacity.activation import Activation, is_gated
from sextant.axes.capacity.base import FeedForward
from sextant.axes.capacity.dense import Dense
from sextant.axes.capacity.stack import ExpertStack
from sextant.axes.numerics import Numerics
from sextant.axes.routing import AnyBalance, AnyOverflow, AnyRouter, Dropless, Routing, SoftmaxTopK, Usage
from sextant.core.cost import At, Cost
from sextant.core.stream import Stream
from sextant.core.trace import Routes


class Experts(FeedForward):
    """E experts of width ``hidden``, of which a token meets ``router.top_k``, and ``shared`` hidden units for all."""

    kind: Literal["experts"] = "experts"
    experts: int = Field(ge=1)
    hidden: int = Field(ge=1)
    router: AnyRouter = SoftmaxTopK(top_k=2)
    overflow: AnyOverflow = Dropless()
    balance: tuple[AnyBalance, ...] = ()
    activation: Activation = "swiglu"
    shared: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Experts:
        self.router.fits(self.experts)
        self.overflow.fits(self.experts)
        return self

    def build(self, width: int, numerics: Numerics) -> ExpertsModule:
        return ExpertsModule(self, width, numerics)

    def cost(self, width: int, at: At) -> Cost:
        cost = self.router.cost(width, self.experts, at) + self.expert_cost(width, at)
        cost += Cost(activation_bytes=at.itemsize * width)
        return cost + self.shared_cost(width, at)

    def expert_cost(self, width: int, at: At) -> Cost:
        """The routed part at payload width ``width``: E experts stored, A met; copies travel there and back.

        A rule that drops is counted as if it took all: how much it drops depends on the router.
        """
        chosen, halves = self.router.top_k, 2 if is_gated(self.activation) else 1
        one = (halves + 1) * width * self.hidden
        rows = at.itemsize * chosen * (2 * width + (halves + 1) * self.hidden) if self.overflow.keeps_rows else 0
        padding = self.overflow.padding(at.tokens, chosen, self.experts)
        return Cost(
            params=self.experts * one,
            active_params=chosen * one,
            flops=2.0 * chosen * one,
            activation_bytes=rows + 8 * chosen,
            exchange_bytes=2 * chosen * width * at.itemsize,
            padding_flops=2.0 * one * padding / at.tokens,
        )

    def shared_cost(self, width: int, at: At) -> Cost:
        """The shared experts, one dense layer."""
        return self._shared().cost(width, at) if self.shared else Cost()

    def _shared(self) -> Dense:
        return Dense(hidden=self.shared, activation=self.activation)


class ExpertsModule(nn.Module):
    """``[T, D] -> [T, D]`` and the layer's :class:`Routing`."""

    def __init__(self, spec: Experts, width: int, numerics: Numerics):
        super().__init__()
        self.spec, self.numerics = spec, numerics
        self.router = spec.router.build(width, spec.experts)
        self.experts = ExpertStack(spec.experts, self._payload(width), spec.hidden, spec.activation)
        self.shared = spec._shared().build(width, numerics) if spec.shared else None

    def _payload(self, width: int) -> int:
        """Width of the rows that travel to the experts."""
        return width

    def forward(self, x_TD: Tensor, stream: Stream, recorded: Routes | None = None) -> tuple[Tensor, Routing]:
        if recorded is None:
            routing = self.spec.overflow.admit(self.router(x_TD), stream, self.training)
        else:
            routing = self._replayed(x_TD, recorded)
        y_TD, usage = self.routed(self.numerics.lower(x_TD), routing)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD, stream)[0]
        return y_TD, replace(routing, usage=usage)

    def _replayed(self, x_TD: Tensor, recorded: Routes) -> Routing:
        """The record's experts under gates of today. Who was sent and who arrived are part of what was chosen."""
        routing, sent_TA, kept_TA = self.router(x_TD, recorded.experts_TA), recorded.sent_TA, recorded.kept_TA
        gates_TA = routing.gates_TA if sent_TA is None else routing.gates_TA * sent_TA
        return replace(routing, gates_TA=gates_TA, sent_TA=sent_TA, kept_TA=kept_TA)

    def routed(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Usage]:
        """Dispatch, experts, combine: fp32 ``[T, D]``."""
        return self.spec.overflow.compute(self.experts, x_TD, routing)
