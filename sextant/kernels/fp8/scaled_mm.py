"""The same products through torch's scaled matrix product, one call for each matrix.

cuBLAS wants the contraction in multiples of 16 (128 with tiles), the right operand's rows in multiples of 16, scales of
tiles with the rows contiguous, and scales of blocks padded to multiples of 4 along the contraction.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sextant.kernels.fp8.scaling import SIDE, Scaled


def rows_each(x: Scaled, weight: Scaled, counts_E: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``y_NF``; where there are counts the device waits for them."""
    if counts_E is None:
        return product(x, one(weight, 0), dtype)
    counts = counts_E.tolist()
    y_NF = x.values.new_empty(len(x.values), weight.values.shape[1], dtype=dtype)
    start = 0
    for matrix, (count, y) in enumerate(zip(counts, y_NF.split(counts), strict=True)):
        if count:
            y.copy_(product(x.rows(start, start + count), one(weight, matrix), dtype))
        start += count
    return y_NF


def columns_each(dy: Scaled, x: Scaled, tiles_E: Tensor | None) -> Tensor:
    """``dw_EFD`` in fp32."""
    if tiles_E is None:
        return product(dy, x, torch.float32)[None]
    dw_EFD = torch.zeros(len(tiles_E), len(dy.values), len(x.values), device=x.values.device)
    start = 0
    for dw, count in zip(dw_EFD, tiles_E.tolist(), strict=True):
        if count:
            dw.copy_(product(_tiles(dy, start, start + count), _tiles(x, start, start + count), torch.float32))
        start += count
    return dw_EFD


def one(weight: Scaled, index: int) -> Scaled:
    """One matrix of a stack."""
    return Scaled(weight.values[index], weight.scale if weight.tile is None else weight.scale[index], weight.tile)


def _tiles(x: Scaled, start: int, stop: int) -> Scaled:
    """Tiles ``start`` to ``stop`` along the last axis."""
    return Scaled(x.values[:, SIDE * start : SIDE * stop].contiguous(), x.scale[:, start:stop], x.tile)


def product(x: Scaled, weight: Scaled, dtype: torch.dtype) -> Tensor:
    """``[N, D]`` times ``[F, D]``, padded to what the library takes and cut again."""
    side = 16 if x.tile is None else SIDE
    left, right = _padded(x.values, 1 if x.tile is None else 16, side), _padded(weight.values, 16, side).t()
    if x.tile is None:
        y = torch._scaled_mm(left, right, scale_a=x.scale, scale_b=weight.scale, out_dtype=dtype)
    else:
        how = [F.ScalingType.BlockWise128x128 if of.tile == (SIDE, SIDE) else F.ScalingType.BlockWise1x128
               for of in (x, weight)]
        scales = [_laid_out(x, left.shape[0]), _laid_out(weight, right.shape[1])]
        y = F.scaled_mm(left, right, scales[0], how[0], scales[1], how[1], output_dtype=dtype)
    return y[: len(x.values), : len(weight.values)].contiguous()


def _padded(values: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros up to multiples; a zero byte is 0 in both formats."""
    more = (0, -values.shape[1] % columns, 0, -values.shape[0] % rows)
    if not any(more):
        return values.contiguous()
    return F.pad(values.contiguous().view(torch.uint8), more).view(values.dtype)


def _laid_out(x: Scaled, rows: int) -> Tensor:
    """Scales as the library wants them: of tiles the rows contiguous, of blocks the steps, in multiples of 4."""
    if x.tile == (SIDE, SIDE):
        more = -x.scale.shape[1] % 4
        return (F.pad(x.scale, (0, more)) if more else x.scale.contiguous()).t()
    more = rows - len(x.scale)
    return (F.pad(x.scale.t(), (0, more)) if more else x.scale.t().contiguous()).t()
