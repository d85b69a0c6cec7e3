"""FP8 with one scale for each tensor, learnt from the steps before (MAI-Base-1; spec mai-base-1 12.1, 12.2).

Forward multiplies E4M3 by E4M3, the data gradient E5M2 by E4M3, both with sums in fp32; the weight gradient stays bf16.
A scale comes from the largest value of the last 1,024 steps, so the cast needs no look at the tensor itself, and one
outlier neither shrinks the scale for a single step nor lets it go at once. What lies beyond saturates and is counted.

A tensor without a history, in the first step, is scaled by its own largest value: gradients of a mean over many tokens
would otherwise all round to zero.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sextant.axes.numerics.base import Operands, Product, Reduce, products
from sextant.axes.numerics.fp8 import FP8, plain_rows, plain_weight_gradient, recomputing
from sextant.kernels import matmul
from sextant.kernels.fp8 import E4M3, FORMATS, remembered, rows_product

X, W, DY = 0, 1, 2
"""Columns of a product's state: its rows, its matrix, the gradient of its result."""


class FP8Delayed(FP8):
    """Delayed scaling of whole tensors: E4M3 forward, E5M2 data gradient, bf16 weight gradient.

    Attributes:
        forward: format of both operands of the forward product; bf16 leaves it alone.
        data_gradient: format of the gradient in the product with the E4M3 matrix; bf16 leaves it alone.
        history: steps whose largest values a scale looks back on.
        margin: powers of two that a scale stays below what the history allows.
    """

    kind: Literal["fp8_delayed"] = "fp8_delayed"
    forward: Literal["e4m3", "bf16"] = "e4m3"
    data_gradient: Literal["e5m2", "e4m3", "bf16"] = "e5m2"
    history: int = Field(default=1024, ge=1)
    margin: int = Field(default=0, ge=0)

    @property
    def operands(self) -> Operands:
        right = "bf16" if self.data_gradient == "bf16" else "e4m3"
        scales = f"one scale per tensor from {self.history:,} steps"
        why = (scales, f"gradients need range; {scales}", "kept bf16: errors here would stay in the optimiser state")
        return Operands((self.forward, self.forward), (self.data_gradient, right), ("bf16", "bf16"), why)

    def product(self) -> DelayedProduct:
        return DelayedProduct(self)

    def after_step(self, model: nn.Module, reduce: Reduce | None = None) -> int:
        found = [module for module in products(model) if isinstance(module, DelayedProduct)]
        return roll(found, self.margin, reduce) if found else 0


class DelayedProduct(Product):
    """State of one matrix, or one stack that shares its scales; columns are :data:`X`, :data:`W`, :data:`DY`.

    Attributes:
        history: fp32 ``[steps, 3]``, largest magnitudes, newest first; 0 before there was one. Saved.
        scale: fp32 ``[3]``, what tensors are multiplied by; 0 while there is no history. Saved.
        amax: fp32 ``[3]``, largest magnitudes since the last step.
        saturated: int64 ``[3]``, values saturated since the last step.
    """

    history: Tensor
    scale: Tensor
    amax: Tensor
    saturated: Tensor

    def __init__(self, spec: FP8Delayed):
        super().__init__()
        self.formats = spec.forward, spec.data_gradient
        self.register_buffer("history", torch.zeros(spec.history, 3))
        self.register_buffer("scale", torch.zeros(3))
        self.register_buffer("amax", torch.zeros(3), persistent=False)
        self.register_buffer("saturated", torch.zeros(3, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor, weight_EFD: Tensor, counts_E: Tensor | None = None) -> Tensor:
        y_NF = torch.ops.sextant.fp8_delayed(
            x.flatten(0, -2), weight_EFD, counts_E, self.scale, self.amax, self.saturated, *self.formats, self.training
        )
        return y_NF.unflatten(0, x.shape[:-1])

    def extra_repr(self) -> str:
        return f"forward {self.formats[0]}, data gradient {self.formats[1]}, {len(self.history)} steps"


def roll(found: list[DelayedProduct], margin: int, reduce: Reduce | None) -> int:
    """End a step: histories take in its largest values, scales follow; returns how many values saturated."""
    amax = torch.stack([module.amax for module in found])
    amax = torch.where(amax.isfinite(), amax, 0.0)  # the trainer stops at such a step; 1,024 others shall not suffer
    amax = amax if reduce is None else reduce(amax)
    older = torch.stack([module.history for module in found])[:, :-1]
    history = torch.cat([amax[:, None], older], dim=1)
    scale = next_scales(history.amax(1), torch.stack([module.scale for module in found]), _largest(found), margin)
    saturated = int(torch.stack([module.saturated for module in found]).sum())
    torch._foreach_copy_([module.history for module in found], list(history.unbind()))
    torch._foreach_copy_([module.scale for module in found], list(scale.unbind()))
    torch._foreach_zero_([module.amax for module in found])
    torch._foreach_zero_([module.saturated for module in found])
    return saturated


def next_scales(amax: Tensor, scale: Tensor, largest: Tensor, margin: int) -> Tensor:
    """``largest / amax / 2^margin`` where that is a number, else unchanged (spec 12.2)."""
    new = largest / amax / 2.0**margin
    return torch.where((amax > 0) & new.isfinite(), new, scale)


def _largest(found: list[DelayedProduct]) -> Tensor:
    """fp32 ``[products, 3]``: the largest value of each tensor's format."""
    rows = [[E4M3.max, E4M3.max, FORMATS.get(module.formats[1], E4M3).max] for module in found]
    return torch.tensor(rows, device=found[0].scale.device)


# The products are opaque to compilers: they note down largest values, which must happen as often as they run, and a
# compiled autograd function of torch 2.11 lost gradients. The state goes in as tensors, so layers share compiled code.


_STATE = "Tensor? counts, Tensor scale, Tensor amax, Tensor saturated, str forward, str data_gradient, bool record"


@torch.library.custom_op(
    "sextant::fp8_delayed", mutates_args=(), schema=f"(Tensor x, Tensor weight, {_STATE}) -> Tensor"
)
def _forward(
    x: Tensor, weight: Tensor, counts: Tensor | None, scale: Tensor, amax: Tensor, saturated: Tensor,
    forward: str, data_gradient: str, record: bool,
) -> Tensor:
    if forward == "bf16":
        return plain_rows(x, weight, counts)
    state, record = (scale, amax, saturated), record and not recomputing()
    rows, matrices = (remembered(part, FORMATS[forward], i, state, record) for i, part in ((X, x), (W, weight)))
    return rows_product(rows, matrices, counts, x.dtype)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, *_rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op(
    "sextant::fp8_delayed_dx", mutates_args=(), schema=f"(Tensor dy, Tensor weight, {_STATE}) -> Tensor"
)
def _data_gradient(
    dy: Tensor, weight: Tensor, counts: Tensor | None, scale: Tensor, amax: Tensor, saturated: Tensor,
    forward: str, data_gradient: str, record: bool,
) -> Tensor:
    if data_gradient == "bf16":
        return plain_rows(dy, weight.mT, counts)
    state = scale, amax, saturated
    matrices = remembered(weight.mT, E4M3, W, state, record and forward == "bf16")  # else forward put it down
    return rows_product(remembered(dy, FORMATS[data_gradient], DY, state, record), matrices, counts, dy.dtype)


@_data_gradient.register_fake
def _(dy: Tensor, weight: Tensor, *_rest: Any) -> Tensor:
    return dy.new_empty(dy.shape[0], weight.shape[2])


@torch.library.custom_op("sextant::bf16_dw", mutates_args=(), schema="(Tensor x, Tensor dy, Tensor counts) -> Tensor")
def _weight_gradient(x: Tensor, dy: Tensor, counts: Tensor) -> Tensor:
    return plain_weight_gradient(x, dy, counts)


@_weight_gradient.register_fake
def _(x: Tensor, dy: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], x.shape[1], dy.shape[1])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, counts, *ctx.rest = inputs  # the state is written to between here and backward: no saved tensor
    ctx.save_for_backward(x, weight, counts)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, counts = ctx.saved_tensors
    dx = torch.ops.sextant.fp8_delayed_dx(dy, weight, counts, *ctx.rest) if ctx.needs_input_grad[0] else None
    dw = None
    if ctx.needs_input_grad[1]:
        dw = matmul.mm(dy.t(), x)[None] if counts is None else torch.ops.sextant.bf16_dw(x, dy, counts).mT
        dw = dw.to(weight.dtype)
    return dx, dw, *[None] * 7


_forward.register_autograd(_backward, setup_context=_remember)
