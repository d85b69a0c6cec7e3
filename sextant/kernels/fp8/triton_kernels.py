"""Grouped fp8 products in Triton: fp8 dot products of 128, scaled and added up in fp32 registers (spec 5.2, 5.3).

No count leaves the device: each program works out which rows are its own. Scales of any kind come as strides, so one
kernel serves tiles, blocks and whole tensors (stride 0). Import this file only where Triton is installed.
"""
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from sextant.kernels.fp8.scaling import SIDE, Scaled
from sextant.kernels.fp8.triton_casts import owned, powers

triton = import_module("triton")  # only a CUDA build of torch brings it, so nothing may name it at import
tl = import_module("triton.language")


@triton.jit
def _rows_kernel(
    x: tl.tensor, weight: tl.tensor, y: tl.tensor, x_scale: tl.tensor, w_scale: tl.tensor,
    counts: tl.tensor, matrices: tl.tensor, count: tl.tensor, width: tl.tensor, depth: tl.tensor,
    x_row: tl.tensor, x_step: tl.tensor, w_matrix: tl.tensor, w_row: tl.tensor, w_step: tl.tensor,
    GROUP: tl.constexpr, MANY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
) -> None:
    """One tile of ``y_NF``; programs beyond the last tile of rows have no owner."""
    matrix, first, stop = owned(counts, matrices, count, tl.program_id(1), MANY, ROWS)
    if matrix >= matrices:
        return
    rows = first + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    own, real, ks = rows < stop, columns < width, tl.arange(0, DEPTH)
    left = x + rows.to(tl.int64)[:, None] * depth + ks[None, :]
    right = weight + (matrix.to(tl.int64) * width + columns)[None, :] * depth + ks[:, None]
    left_scale, right_scale = x_scale + rows * x_row, w_scale + matrix * w_matrix + (columns // GROUP) * w_row
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for step in range(0, tl.cdiv(depth, DEPTH)):
        inside = ks < depth - step * DEPTH
        a = tl.load(left + step * DEPTH, mask=own[:, None] & inside[None, :], other=0.0)
        b = tl.load(right + step * DEPTH, mask=inside[:, None] & real[None, :], other=0.0)
        a_scale = tl.load(left_scale + step * x_step, mask=own, other=0.0)
        b_scale = tl.load(right_scale + step * w_step, mask=real, other=0.0)
        total += tl.dot(a, b) * a_scale[:, None] * b_scale[None, :]
    where = y + rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(where, total.to(y.dtype.element_ty), mask=own[:, None] & real[None, :])


@triton.jit
def _columns_kernel(
    dy: tl.tensor, x: tl.tensor, dw: tl.tensor, dy_scale: tl.tensor, x_scale: tl.tensor, tiles: tl.tensor,
    matrices: tl.tensor, tall: tl.tensor, wide: tl.tensor, depth: tl.tensor, dy_row: tl.tensor, dy_step: tl.tensor,
    x_row: tl.tensor, x_step: tl.tensor,
    MANY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
) -> None:
    """One tile of one matrix of ``dw_EFD``: a sum over the tiles of tokens that the matrix owns."""
    matrix = tl.program_id(2)
    begin, end = _span(tiles, matrices, matrix, depth // DEPTH, MANY)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    own, real, ks = rows < tall, columns < wide, tl.arange(0, DEPTH)
    left = dy + rows.to(tl.int64)[:, None] * depth + ks[None, :]
    right = x + columns.to(tl.int64)[None, :] * depth + ks[:, None]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for step in range(begin, end):
        a = tl.load(left + step * DEPTH, mask=own[:, None], other=0.0)
        b = tl.load(right + step * DEPTH, mask=real[None, :], other=0.0)
        a_scale = tl.load(dy_scale + rows * dy_row + step * dy_step, mask=own, other=0.0)
        b_scale = tl.load(x_scale + columns * x_row + step * x_step, mask=real, other=0.0)
        total += tl.dot(a, b) * a_scale[:, None] * b_scale[None, :]
    where = dw + (matrix.to(tl.int64) * tall + rows)[:, None] * wide + columns[None, :]
    tl.store(where, total, mask=own[:, None] & real[None, :])


@triton.jit
def _span(
    tiles: tl.tensor, matrices: tl.tensor, matrix: tl.tensor, steps: tl.tensor, MANY: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """First tile of a matrix, and where its tiles end; all of them without counts (``MANY`` 0)."""
    if MANY == 0:
        return matrix * 0, steps
    else:
        index = tl.arange(0, MANY)
        count = tl.load(tiles + index, mask=index < matrices, other=0).to(tl.int32)
        begin = tl.sum(tl.where(index < matrix, count, 0), axis=0)
        return begin, begin + tl.sum(tl.where(index == matrix, count, 0), axis=0)


def rows_grouped(x: Scaled, weight: Scaled, counts_E: Tensor | None, dtype: torch.dtype, tile: int = 128) -> Tensor:
    """``y_NF`` of rows ``[N, D]`` and ``[E, F, D]``."""
    (count, depth), (matrices, width, _) = x.values.shape, weight.values.shape
    y_NF = x.values.new_empty(count, width, dtype=dtype)
    x_strides = x.scale.stride() if x.tile else (0, 0)
    w_strides = weight.scale.stride() if weight.tile else (0, 0, 0)
    _rows_kernel[(triton.cdiv(width, tile), _places(count, tile, counts_E))](
        x.values, weight.values, y_NF, x.scale, weight.scale, x.values if counts_E is None else counts_E,
        matrices, count, width, depth, *x_strides, *w_strides, GROUP=weight.tile[0] if weight.tile else 1,
        MANY=_many(counts_E), ROWS=tile, COLUMNS=tile, DEPTH=SIDE, num_warps=8 if tile > 64 else 4, num_stages=3,
    )
    return y_NF


def _places(rows: int, tile: int, counts_E: Tensor | None) -> int:
    """Tiles of rows, enough whatever the counts are."""
    return triton.cdiv(rows, tile) if counts_E is None else rows // tile + len(counts_E)


def _many(counts_E: Tensor | None) -> int:
    return 0 if counts_E is None else powers(len(counts_E))


def columns_grouped(dy: Scaled, x: Scaled, tiles_E: Tensor | None, tile: int = 128) -> Tensor:
    """``dw_EFD`` in fp32 of ``[F, N]`` and ``[D, N]``, each expert over its own tiles of N."""
    (tall, depth), wide, matrices = dy.values.shape, len(x.values), 1 if tiles_E is None else len(tiles_E)
    dw_EFD = torch.empty(matrices, tall, wide, device=x.values.device)
    _columns_kernel[(triton.cdiv(wide, tile), triton.cdiv(tall, tile), matrices)](
        dy.values, x.values, dw_EFD, dy.scale, x.scale, x.values if tiles_E is None else tiles_E, matrices, tall, wide,
        depth, *dy.scale.stride(), *x.scale.stride(), MANY=_many(tiles_E),
        ROWS=tile, COLUMNS=tile, DEPTH=SIDE, num_warps=8 if tile > 64 else 4, num_stages=3,
    )
    return dw_EFD
