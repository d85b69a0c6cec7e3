"""FP8 with a scale for every tile and block, found as the tensor is cast (DeepSeek-V3; spec deepseek-v3 5.1, 5.2).

E4M3 for all three products. Rows have a scale for each 128 channels, matrices one for each block of 128 by 128; in the
weight gradient, which sums over tokens, both operands have one for each 128 tokens of a channel. Nothing is remembered
from step to step, and nothing can saturate.

Two things of the paper are left out: what the weight gradient needs is kept in bf16 and tiled once along tokens, where
the paper keeps the tiles along channels and tiles again (half the memory, one more rounding); and the rows before
attention's last matrix are E4M3 like all others, not E5M6.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from sextant.axes.numerics.base import Operands, Product
from sextant.axes.numerics.fp8 import FP8
from sextant.kernels.fp8 import (
    E4M3,
    FLOOR,
    GRADIENT_FLOOR,
    SIDE,
    blocks,
    columns_product,
    rows_product,
    tiles,
    tiles_down,
)


class FP8Blocks(FP8):
    """Tiles of 1 x 128 and blocks of 128 x 128, E4M3 forward, data gradient and weight gradient.

    Attributes:
        power_of_two: scales rounded up to powers of two, as UE8M0 holds them (V3.1).
    """

    kind: Literal["fp8_blocks"] = "fp8_blocks"
    power_of_two: bool = False

    @property
    def operands(self) -> Operands:
        rows, columns = "a scale per 1x128 tile and 128x128 block", "a scale per 128 tokens of a channel"
        both = "e4m3", "e4m3"
        return Operands(both, both, both, (rows, rows, columns))

    def product(self) -> BlocksProduct:
        return BlocksProduct(self.power_of_two)


class BlocksProduct(Product):
    """One matrix or one stack; no state."""

    def __init__(self, power_of_two: bool):
        super().__init__()
        self.power_of_two = power_of_two

    def forward(self, x: Tensor, weight_EFD: Tensor, counts_E: Tensor | None = None) -> Tensor:
        y_NF = torch.ops.sextant.fp8_blocks(x.flatten(0, -2), weight_EFD, counts_E, self.power_of_two)
        return y_NF.unflatten(0, x.shape[:-1])

    def extra_repr(self) -> str:
        return "tiles 1x128, blocks 128x128" + (", scales powers of two" if self.power_of_two else "")


@torch.library.custom_op(
    "sextant::fp8_blocks", mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? counts, bool power_of_two) -> Tensor",
)
def _forward(x: Tensor, weight: Tensor, counts: Tensor | None, power_of_two: bool) -> Tensor:
    rows, matrices = tiles(x, E4M3, FLOOR, power_of_two), blocks(weight, E4M3, power_of_two)
    return rows_product(rows, matrices, counts, x.dtype)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor | None, power_of_two: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op(
    "sextant::fp8_blocks_dx", mutates_args=(),
    schema="(Tensor dy, Tensor weight, Tensor? counts, bool power_of_two) -> Tensor",
)
def _data_gradient(dy: Tensor, weight: Tensor, counts: Tensor | None, power_of_two: bool) -> Tensor:
    rows, matrices = tiles(dy, E4M3, GRADIENT_FLOOR, power_of_two), blocks(weight.mT, E4M3, power_of_two)
    return rows_product(rows, matrices, counts, dy.dtype)


@_data_gradient.register_fake
def _(dy: Tensor, weight: Tensor, counts: Tensor | None, power_of_two: bool) -> Tensor:
    return dy.new_empty(dy.shape[0], weight.shape[2])


@torch.library.custom_op(
    "sextant::fp8_blocks_dw", mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor? counts, SymInt matrices, bool power_of_two) -> Tensor",
)
def _weight_gradient(dy: Tensor, x: Tensor, counts: Tensor | None, matrices: int, power_of_two: bool) -> Tensor:
    floors = (dy, GRADIENT_FLOOR), (x, FLOOR)
    columns = [tiles_down(part, E4M3, floor, power_of_two, counts) for part, floor in floors]
    return columns_product(columns[0], columns[1], None if counts is None else (counts + SIDE - 1) // SIDE)


@_weight_gradient.register_fake
def _(dy: Tensor, x: Tensor, counts: Tensor | None, matrices: int, power_of_two: bool) -> Tensor:
    return x.new_empty(matrices, dy.shape[1], x.shape[1], dtype=torch.float32)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, counts, ctx.power_of_two = inputs
    ctx.save_for_backward(x, weight, counts)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, counts = ctx.saved_tensors
    dx = dw = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.sextant.fp8_blocks_dx(dy, weight, counts, ctx.power_of_two)
    if ctx.needs_input_grad[1]:
        dw = torch.ops.sextant.fp8_blocks_dw(dy, x, counts, weight.shape[0], ctx.power_of_two).to(weight.dtype)
    return dx, dw, None, None


_forward.register_autograd(_backward, setup_context=_remember)
