"""The matrices of all experts of a layer, and the ways to take rows through them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sextant.axes.capacity.activation import Activation, activate, is_gated
from sextant.axes.numerics import Product
from sextant.axes.stability import Role
from sextant.kernels import matmul
from sextant.kernels.grouped import grouped_linear, grouped_swiglu, row_linear

LITTLE = 1 << 21
"""Multiply-adds of one expert, all rows of a step, that cost a CPU less than sorting rows and a call for each do."""


class ExpertStack(nn.Module):
    """All experts of a layer: ``up_EDF`` holds gate and value side by side when gated, ``down_EFD`` the way back."""

    roles = {"up_EDF": Role.FF_IN, "down_EFD": Role.FF_OUT}

    def __init__(self, experts: int, width: int, hidden: int, activation: Activation):
        super().__init__()
        self.experts = experts
        self.activation: Activation = activation
        halves = 2 if is_gated(activation) else 1
        self.joint = {"up_EDF": halves}
        self.up_EDF = nn.Parameter(torch.empty(experts, width, halves * hidden))
        self.down_EFD = nn.Parameter(torch.empty(experts, hidden, width))
        self.products = nn.ModuleDict()

    def attach(self, make: Callable[[], Product]) -> None:
        """Both stacks multiply by products of their own from now on; each is one tensor to them."""
        self.products.update({"up": make(), "down": make()})

    @property
    def weights(self) -> int:
        """Of one expert."""
        return self.up_EDF[0].numel() + self.down_EFD[0].numel()

    @property
    def stacks(self) -> tuple[Tensor, Tensor]:
        """The matrices of all experts, up and down."""
        return self.up_EDF, self.down_EFD

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        if len(self.products):
            return self._by_products(x_ND, self.up_EDF, self.down_EFD, counts_E)
        if self.activation == "swiglu":
            return grouped_swiglu(x_ND, self.up_EDF, self.down_EFD, counts_E)
        return grouped_linear(self._activate(grouped_linear(x_ND, self.up_EDF, counts_E)), self.down_EFD, counts_E)

    def one(self, x_ND: Tensor, up_DF: Tensor, down_FD: Tensor) -> Tensor:
        """Rows through the expert with these matrices."""
        if len(self.products):
            return self._by_products(x_ND, up_DF[None], down_FD[None])
        return matmul.mm(self._activate(matmul.mm(x_ND, up_DF.to(x_ND.dtype))), down_FD.to(x_ND.dtype))

    def few(self, x_TD: Tensor, experts_TA: Tensor) -> Tensor | None:
        """``y_TAD`` without sorting, where it is faster: all experts on all rows, or each copy by itself; else None."""
        if x_TD.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling() or len(self.products):
            return None
        copies = experts_TA.numel()
        if 2 * copies > self.experts and len(x_TD) * self.weights <= LITTLE:
            return self.all(x_TD)[experts_TA, torch.arange(len(x_TD))[:, None]]
        if copies <= self.experts:
            rows_ND = x_TD.repeat_interleave(experts_TA.shape[1], dim=0)
            return self.each(rows_ND, experts_TA.flatten().tolist()).unflatten(0, experts_TA.shape)
        return None

    def each(self, x_ND: Tensor, experts: list[int]) -> Tensor:
        """Rows in any order, each with its expert's number; keeps no gradient."""
        return row_linear(self._activate(row_linear(x_ND, self.up_EDF, experts)), self.down_EFD, experts)

    def all(self, x_TD: Tensor) -> Tensor:
        """Every row by every expert, ``[E, T, D]``."""
        x_ETD = x_TD.expand(len(self.up_EDF), -1, -1)
        h_ETF = matmul.mm(x_ETD, self.up_EDF.to(x_TD.dtype))
        return matmul.mm(self._activate(h_ETF), self.down_EFD.to(x_TD.dtype))

    def _by_products(self, x_ND: Tensor, up_EDF: Tensor, down_EFD: Tensor, counts_E: Tensor | None = None) -> Tensor:
        h_NF = self.products["up"](x_ND, up_EDF.mT, counts_E)
        return self.products["down"](self._activate(h_NF), down_EFD.mT, counts_E)

    def _activate(self, h_NF: Tensor) -> Tensor:
        gate_NF, value_NF = h_NF.chunk(2, dim=-1) if is_gated(self.activation) else (h_NF, None)
        return activate(self.activation, gate_NF, value_NF)
