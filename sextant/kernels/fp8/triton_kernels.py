"""Grouped fp8 products in Triton: fp8 dot products of 128, scaled and added up in fp32 registers (spec 5.2, 5.3).

No count leaves the device: which rows a program owns is worked out there. Scales of any kind come as strides, so one
kernel serves tiles, blocks and whole tensors (stride 0). Import this file only where Triton is installed.
"""
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from sextant.kernels.fp8.scaling import SIDE, Scaled

triton = import_module("triton")  # only a CUDA build of torch brings it, so nothing may name it at import
tl = import_module("triton.language")


@triton.jit
def _rows_kernel(
    x: tl.tensor, weight: tl.tensor, y: tl.tensor, x_scale: tl.tensor, w_scale: tl.tensor,
    owner: tl.tensor, first: tl.tensor, stop: tl.tensor, matrices: tl.tensor, width: tl.tensor, depth: tl.tensor,
    x_row: tl.tensor, x_step: tl.tensor, w_matrix: tl.tensor, w_row: tl.tensor, w_step: tl.tensor,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
) -> None:
    """One tile of ``y_NF``; programs beyond the last tile of rows have no owner."""
    place = tl.program_id(1)
    matrix = tl.load(owner + place)
    if matrix >= matrices:
        return
    rows = tl.load(first + place) + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    own, real, ks = rows < tl.load(stop + matrix), columns < width, tl.arange(0, DEPTH)
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
    dy: tl.tensor, x: tl.tensor, dw: tl.tensor, dy_scale: tl.tensor, x_scale: tl.tensor, ends: tl.tensor,
    tall: tl.tensor, wide: tl.tensor, depth: tl.tensor, steps: tl.tensor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
) -> None:
    """One tile of one matrix of ``dw_EFD``: a sum over the tiles of tokens that the matrix owns."""
    matrix = tl.program_id(2)
    begin, end = tl.load(ends + matrix), tl.load(ends + matrix + 1)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    own, real, ks = rows < tall, columns < wide, tl.arange(0, DEPTH)
    left = dy + rows.to(tl.int64)[:, None] * depth + ks[None, :]
    right = x + columns.to(tl.int64)[None, :] * depth + ks[:, None]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for step in range(begin, end):
        a = tl.load(left + step * DEPTH, mask=own[:, None], other=0.0)
        b = tl.load(right + step * DEPTH, mask=real[None, :], other=0.0)
        a_scale = tl.load(dy_scale + rows * steps + step, mask=own, other=0.0)
        b_scale = tl.load(x_scale + columns * steps + step, mask=real, other=0.0)
        total += tl.dot(a, b) * a_scale[:, None] * b_scale[None, :]
    where = dw + (matrix.to(tl.int64) * tall + rows)[:, None] * wide + columns[None, :]
    tl.store(where, total, mask=own[:, None] & real[None, :])


def rows_grouped(x: Scaled, weight: Scaled, counts_E: Tensor | None, dtype: torch.dtype, tile: int = 128) -> Tensor:
    """``y_NF`` of rows ``[N, D]`` and ``[E, F, D]``."""
    (count, depth), (matrices, width, _) = x.values.shape, weight.values.shape
    y_NF = x.values.new_empty(count, width, dtype=dtype)
    owner, first, stop = _owners(counts_E, count, matrices, tile, x.values.device)
    x_strides = x.scale.stride() if x.tile else (0, 0)
    w_strides = weight.scale.stride() if weight.tile else (0, 0, 0)
    _rows_kernel[(triton.cdiv(width, tile), len(owner))](
        x.values, weight.values, y_NF, x.scale, weight.scale, owner, first, stop, matrices, width, depth,
        *x_strides, *w_strides, GROUP=weight.tile[0] if weight.tile else 1,
        ROWS=tile, COLUMNS=tile, DEPTH=SIDE, num_warps=8 if tile > 64 else 4, num_stages=3,
    )
    return y_NF


def _owners(
    counts_E: Tensor | None, rows: int, matrices: int, tile: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every tile of rows its matrix (``matrices`` when it has none) and first row; of every matrix where it ends."""
    counts_E = torch.full((1,), rows, device=device) if counts_E is None else counts_E
    tiles_E = (counts_E + tile - 1) // tile
    ends_E, stop_E = tiles_E.cumsum(0), counts_E.cumsum(0)
    place = torch.arange(-(-rows // tile) + matrices, device=device)
    owner = torch.searchsorted(ends_E, place, right=True)
    safe = owner.clamp_max(matrices - 1)
    first = (stop_E - counts_E)[safe] + (place - (ends_E - tiles_E)[safe]) * tile
    return owner.int(), first.int(), stop_E.int()


def columns_grouped(dy: Scaled, x: Scaled, tiles_E: Tensor, tile: int = 128) -> Tensor:
    """``dw_EFD`` in fp32 of ``[F, N]`` and ``[D, N]``, each expert over its own tiles of N."""
    (tall, depth), wide = dy.values.shape, len(x.values)
    dw_EFD = torch.empty(len(tiles_E), tall, wide, device=x.values.device)
    ends = torch.nn.functional.pad(tiles_E.cumsum(0), (1, 0)).int()
    _columns_kernel[(triton.cdiv(wide, tile), triton.cdiv(tall, tile), len(tiles_E))](
        dy.values, x.values, dw_EFD, dy.scale.contiguous(), x.scale.contiguous(), ends, tall, wide, depth,
        dy.scale.shape[1], ROWS=tile, COLUMNS=tile, DEPTH=SIDE, num_warps=8 if tile > 64 else 4, num_stages=3,
    )
    return dw_EFD
