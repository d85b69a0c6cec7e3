"""A mixture of experts: router, capacity rule, dispatch, experts, combine, and experts that every token shares.

MAI-Base-1 sections 6 to 8; Mixtral 2401.04088; fine-grained and shared experts 2401.06066. The router sees the fp32
row; copies go to their experts sorted and in a fixed order; the combine is fp32.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sextant.axes.capacity.activation import Activation, activate, is_gated
from sextant.axes.capacity.base import FeedForward
from sextant.axes.capacity.dense import Dense
from sextant.axes.numerics import Numerics
from sextant.axes.routing import AnyBalance, AnyOverflow, AnyRouter, Dropless, Routing, SoftmaxTopK
from sextant.axes.stability import Role
from sextant.core.cost import At, Cost
from sextant.kernels.grouped import grouped_linear, grouped_swiglu, row_linear, row_tile
from sextant.kernels.permute import combine, dispatch, plan

LITTLE = 1 << 21
"""Multiply-adds of one expert, all rows of a step, that cost a CPU less than sorting rows and a call for each do."""


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
        if self.router.top_k > self.experts:
            raise ValueError(f"router.top_k {self.router.top_k} exceeds experts {self.experts}")
        return self

    def build(self, width: int, numerics: Numerics) -> ExpertsModule:
        return ExpertsModule(self, width, numerics)

    def cost(self, width: int, at: At) -> Cost:
        cost = self.router.cost(width, self.experts, at) + self.expert_cost(width, at)
        cost += Cost(activation_bytes=at.itemsize * width)
        return cost + self.shared_cost(width, at)

    def expert_cost(self, width: int, at: At) -> Cost:
        """The routed part at payload width ``width``: E experts stored, A met; copies travel there and back."""
        chosen, halves = self.router.top_k, 2 if is_gated(self.activation) else 1
        one = (halves + 1) * width * self.hidden
        kept = at.itemsize * chosen * (2 * width + (halves + 1) * self.hidden) + 8 * chosen
        return Cost(
            params=self.experts * one,
            active_params=chosen * one,
            flops=2.0 * chosen * one,
            activation_bytes=kept,
            exchange_bytes=2 * chosen * width * at.itemsize,
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
        self.experts = ExpertStack(spec, self._payload(width))
        self.shared = spec._shared().build(width, numerics) if spec.shared else None

    def _payload(self, width: int) -> int:
        """Width of the rows that travel to the experts."""
        return width

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Routing]:
        routing = self.router(x_TD)
        y_TD = self.routed(self.numerics.lower(x_TD), routing)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)[0]
        return y_TD, routing

    def routed(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Dispatch, experts, combine: fp32 ``[T, D]``."""
        gates_TA = self.spec.overflow.admit(routing)
        if x_TD.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            y_TAD = self._few(x_TD, routing.experts_TA)
            if y_TAD is not None:
                return torch.linalg.vecdot(y_TAD.to(gates_TA.dtype), gates_TA[..., None], dim=1)
        where = plan(routing.experts_TA, self.spec.experts, row_tile(x_TD, routing.experts_TA.numel()))
        rows_ND = dispatch(x_TD, where, self.spec.router.top_k)
        return combine(self.experts(rows_ND, where.counts_E), gates_TA, where)

    def _few(self, x_TD: Tensor, experts_TA: Tensor) -> Tensor | None:
        """Without sorting: all experts on all rows, or each copy by itself, where that is faster; else None."""
        experts, copies = self.spec.experts, experts_TA.numel()
        if 2 * copies > experts and len(x_TD) * self.experts.weights <= LITTLE:
            return self.experts.all(x_TD)[experts_TA, torch.arange(len(x_TD))[:, None]]
        if copies <= experts:
            rows_ND = x_TD.repeat_interleave(experts_TA.shape[1], dim=0)
            return self.experts.each(rows_ND, experts_TA.flatten().tolist()).unflatten(0, experts_TA.shape)
        return None


class ExpertStack(nn.Module):
    """All experts of a layer: ``up_EDF`` holds gate and value side by side when gated, ``down_EFD`` the way back."""

    roles = {"up_EDF": Role.FF_IN, "down_EFD": Role.FF_OUT}

    def __init__(self, spec: Experts, width: int):
        super().__init__()
        self.activation: Activation = spec.activation
        halves = 2 if is_gated(spec.activation) else 1
        self.up_EDF = nn.Parameter(torch.empty(spec.experts, width, halves * spec.hidden))
        self.down_EFD = nn.Parameter(torch.empty(spec.experts, spec.hidden, width))

    @property
    def weights(self) -> int:
        """Of one expert."""
        return self.up_EDF[0].numel() + self.down_EFD[0].numel()

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        if self.activation == "swiglu":
            return grouped_swiglu(x_ND, self.up_EDF, self.down_EFD, counts_E)
        return grouped_linear(self._activate(grouped_linear(x_ND, self.up_EDF, counts_E)), self.down_EFD, counts_E)

    def each(self, x_ND: Tensor, experts: list[int]) -> Tensor:
        """Rows in any order, each with its expert's number; keeps no gradient."""
        return row_linear(self._activate(row_linear(x_ND, self.up_EDF, experts)), self.down_EFD, experts)

    def all(self, x_TD: Tensor) -> Tensor:
        """Every row by every expert, ``[E, T, D]``."""
        x_ETD = x_TD.expand(len(self.up_EDF), -1, -1)
        return torch.bmm(self._activate(torch.bmm(x_ETD, self.up_EDF.to(x_TD.dtype))), self.down_EFD.to(x_TD.dtype))

    def _activate(self, h_NF: Tensor) -> Tensor:
        gate_NF, value_NF = h_NF.chunk(2, dim=-1) if is_gated(self.activation) else (h_NF, None)
        return activate(self.activation, gate_NF, value_NF)
