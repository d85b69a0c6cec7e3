"""FP8 casts in Triton: one reading of a tensor gives values, scales and, if asked, the largest value and a count.

Every program casts a tile of 128 by 128 of a tensor as it lies in memory and stores it as it lies or turned, so that no
fp8 transpose is left. Bits equal those of :mod:`sextant.kernels.fp8.scaling`: division is IEEE's, magnitudes are
compared as integers (which orders them as floats do, NaN above all). Import this file only where Triton is installed.
"""
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from sextant.kernels.fp8.formats import E4M3, Format
from sextant.kernels.fp8.scaling import FLOOR, SIDE, Scaled, as_it_lies

triton = import_module("triton")  # only a CUDA build of torch brings it, so nothing may name it at import
tl = import_module("triton.language")

PARTS = 256
"""Programs that look for the largest value of a tensor without a history."""

ROW, COLUMN, BLOCK = 1, 0, 2
"""What shares a scale: 1 x 128 as the tensor lies, 128 x 1, 128 x 128."""


@triton.jit
def _magnitude(x: tl.tensor) -> tl.tensor:
    """Bits of the absolute fp32 value."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _largest(bits: tl.tensor) -> tl.tensor:
    return tl.max(tl.max(bits, axis=1), axis=0)


@triton.jit
def _at_least(bits: tl.tensor, FLOOR: tl.constexpr) -> tl.tensor:
    """The number of these bits or the floor; NaN stays."""
    return tl.maximum(bits, tl.full((), FLOOR, tl.float32).to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _store(
    values: tl.tensor, numbers: tl.tensor, rows: tl.tensor, columns: tl.tensor, tall: tl.tensor, wide: tl.tensor,
    MAX: tl.constexpr, TURN: tl.constexpr,
) -> None:
    """Saturate, round to nearest even, put down at rows and columns of the matrix that ``program_id(2)`` says."""
    cast = tl.clamp(numbers, -MAX, MAX, propagate_nan=tl.PropagateNan.ALL).to(values.dtype.element_ty)
    matrix = values + tl.program_id(2).to(tl.int64) * tall * wide
    if TURN:
        where = matrix + columns.to(tl.int64)[:, None] * tall + rows[None, :]
        tl.store(where, tl.trans(cast), mask=(columns < wide)[:, None] & (rows < tall)[None, :])
    else:
        where = matrix + rows.to(tl.int64)[:, None] * wide + columns[None, :]
        tl.store(where, cast, mask=(rows < tall)[:, None] & (columns < wide)[None, :])


@triton.jit(do_not_specialize=["column"])
def _largest_kernel(
    x: tl.tensor, scale: tl.tensor, parts: tl.tensor, count: tl.tensor, column: tl.tensor, STEP: tl.constexpr,
) -> None:
    """The largest magnitude that each program met, as bits; nothing where there is a scale already."""
    if tl.load(scale + column) > 0:
        return
    bits = tl.zeros((STEP,), dtype=tl.int32)
    for start in range(tl.program_id(0).to(tl.int64) * STEP, count, tl.num_programs(0) * STEP):
        where = start + tl.arange(0, STEP)
        bits = tl.maximum(bits, _magnitude(tl.load(x + where, mask=where < count, other=0.0)))
    tl.store(parts + tl.program_id(0), tl.max(bits, axis=0))


@triton.jit(do_not_specialize=["column"])
def _whole_kernel(
    x: tl.tensor, values: tl.tensor, restore: tl.tensor, scale: tl.tensor, parts: tl.tensor, amax: tl.tensor,
    saturated: tl.tensor, column: tl.tensor, tall: tl.tensor, wide: tl.tensor,
    MAX: tl.constexpr, LIMIT: tl.constexpr, TURN: tl.constexpr, RECORD: tl.constexpr, PARTS: tl.constexpr,
    SIDE: tl.constexpr,
) -> None:
    """One tile of a tensor with one scale; ``PARTS`` is 0 where a scale of 0 means 0."""
    factor = tl.load(scale + column)
    if PARTS > 0:  # noqa: SIM102 - one is known to the compiler, the other to the device
        if not factor > 0:
            bits = tl.max(tl.load(parts + tl.arange(0, PARTS)), axis=0)
            factor = tl.div_rn(tl.full((), MAX, tl.float32), _at_least(bits, 1e-30))
    rows, columns = tl.program_id(1) * SIDE + tl.arange(0, SIDE), tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    where = x + tl.program_id(2).to(tl.int64) * tall * wide + rows.to(tl.int64)[:, None] * wide + columns[None, :]
    found = tl.load(where, mask=(rows < tall)[:, None] & (columns < wide)[None, :], other=0.0)
    numbers = found.to(tl.float32) * factor
    if RECORD:
        tl.atomic_max(amax + column, _largest(_magnitude(found)), sem="relaxed")
        over = tl.sum(tl.sum((tl.abs(numbers) > LIMIT).to(tl.int32), axis=1), axis=0)
        tl.atomic_add(saturated + column, over.to(tl.int64), sem="relaxed")
    _store(values, numbers, rows, columns, tall, wide, MAX, TURN)
    if tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0:
        tl.store(restore, tl.div_rn(tl.full((), 1.0, tl.float32), factor))


@triton.jit
def owned(
    counts: tl.tensor, matrices: tl.tensor, rows: tl.tensor, place: tl.tensor, MANY: tl.constexpr, SIDE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Of a tile of rows its matrix (``matrices`` or more: none), its first row, and where the matrix's rows end.

    Each matrix begins with a tile of its own. ``MANY`` is a power of two not below ``matrices``; 0 without counts.
    """
    if MANY == 0:
        return place * SIDE // tl.maximum(rows, 1), place * SIDE, rows
    else:
        index = tl.arange(0, MANY)
        count = tl.load(counts + index, mask=index < matrices, other=0).to(tl.int32)
        tiles = (count + SIDE - 1) // SIDE
        ends, stops = tl.cumsum(tiles, axis=0), tl.cumsum(count, axis=0)
        matrix = tl.sum((ends <= place).to(tl.int32), axis=0)
        own = index == matrix
        stop = tl.sum(tl.where(own, stops, 0), axis=0)
        begin = tl.sum(tl.where(own, stops - count - (ends - tiles) * SIDE, 0), axis=0)
        return matrix, begin + place * SIDE, stop


@triton.jit
def _groups_kernel(
    x: tl.tensor, values: tl.tensor, scale: tl.tensor, counts: tl.tensor, matrices: tl.tensor, rows: tl.tensor,
    tall: tl.tensor, wide: tl.tensor, s_matrix: tl.tensor, s_row: tl.tensor, s_column: tl.tensor,
    MAX: tl.constexpr, FLOOR: tl.constexpr, GROUP: tl.constexpr, TURN: tl.constexpr, POWER: tl.constexpr,
    MANY: tl.constexpr, SIDE: tl.constexpr,
) -> None:
    """One tile of a tensor whose groups are scaled by their own largest value; ``tall`` rows are made of ``rows``."""
    place, step, ks = tl.program_id(1), tl.program_id(0), tl.arange(0, SIDE)
    _, first, stop = owned(counts, matrices, rows, place, MANY, SIDE)
    columns, puts = step * SIDE + ks, place * SIDE + ks
    where = tl.program_id(2).to(tl.int64) * rows * wide + (first + ks).to(tl.int64)[:, None] * wide + columns[None, :]
    inside = (first + ks < stop)[:, None] & (columns < wide)[None, :]
    found = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
    groups = scale + tl.program_id(2) * s_matrix
    if GROUP == 1:
        by = _restoring(tl.max(_magnitude(found), axis=1), MAX, FLOOR, POWER)
        tl.store(groups + puts.to(tl.int64) * s_row + step * s_column, by, mask=puts < tall)
        numbers = tl.div_rn(found, by[:, None])
    elif GROUP == 0:
        by = _restoring(tl.max(_magnitude(found), axis=0), MAX, FLOOR, POWER)
        tl.store(groups + place.to(tl.int64) * s_row + columns * s_column, by, mask=columns < wide)
        numbers = tl.div_rn(found, by[None, :])
    else:
        by = _restoring(_largest(_magnitude(found)), MAX, FLOOR, POWER)
        tl.store(groups + place * s_row + step * s_column, by)
        numbers = tl.div_rn(found, by)
    _store(values, numbers, puts, columns, tall, wide, MAX, TURN)


@triton.jit
def _restoring(bits: tl.tensor, MAX: tl.constexpr, FLOOR: tl.constexpr, POWER: tl.constexpr) -> tl.tensor:
    """As :func:`sextant.kernels.fp8.scaling.restoring`."""
    scale = tl.div_rn(_at_least(bits, FLOOR), tl.full((), MAX, tl.float32))
    if POWER:
        up = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & -0x800000
        scale = up.to(tl.float32, bitcast=True)
    return scale


def whole(x: Tensor, scale: Tensor, form: Format) -> tuple[Scaled, Tensor]:
    """As :func:`sextant.kernels.fp8.scaling.whole`."""
    amax = torch.zeros(1, dtype=torch.int32, device=x.device)
    saturated = torch.zeros((), dtype=torch.int64, device=x.device)
    return _whole(*as_it_lies(x), form, scale.float(), None, amax, saturated, 0, True), saturated


def remembered(x: Tensor, form: Format, column: int, state: tuple[Tensor, Tensor, Tensor], record: bool) -> Scaled:
    """As :func:`sextant.kernels.fp8.scaling.remembered`: two launches, and nothing waits for the device."""
    (lying, turn), (scale, amax, saturated) = as_it_lies(x), state
    parts = torch.empty(PARTS, dtype=torch.int32, device=x.device)
    _largest_kernel[(PARTS,)](lying, scale, parts, lying.numel(), column, STEP=4096, num_warps=8)
    return _whole(lying, turn, form, scale, parts, amax.view(torch.int32), saturated, column, record)


def _whole(
    lying: Tensor, turn: bool, form: Format, scale: Tensor, parts: Tensor | None, amax: Tensor, saturated: Tensor,
    column: int, record: bool,
) -> Scaled:
    matrices, rows, columns = _sizes(lying, turn)
    values = torch.empty(lying.mT.shape if turn else lying.shape, dtype=form.dtype, device=lying.device)
    restore = torch.empty((), device=lying.device)
    _whole_kernel[_grid(columns, rows, matrices)](
        lying, values, restore, scale, scale if parts is None else parts, amax, saturated, column, rows, columns,
        MAX=form.max, LIMIT=form.limit, TURN=turn, RECORD=record, PARTS=0 if parts is None else PARTS, SIDE=SIDE,
        num_warps=8,
    )
    return Scaled(values, restore)


def tiles(x: Tensor, form: Format = E4M3, floor: float = FLOOR, power_of_two: bool = False) -> Scaled:
    """As :func:`sextant.kernels.fp8.scaling.tiles`; scales of a row lie apart, as libraries want them."""
    lying, turn = as_it_lies(x)
    values = torch.empty(x.shape, dtype=form.dtype, device=x.device)
    scale = torch.empty(*x.shape[:-2], _tiles(x.shape[-1]), x.shape[-2], device=x.device).mT
    sizes, group = _sizes(lying, True), COLUMN if turn else ROW
    return _groups(lying, sizes, sizes[1], Scaled(values, scale, (1, SIDE)), form, group, turn, floor, power_of_two)


def tiles_down(
    x: Tensor, form: Format = E4M3, floor: float = FLOOR, power_of_two: bool = False, counts_E: Tensor | None = None
) -> Scaled:
    """As :func:`sextant.kernels.fp8.scaling.tiles_down`: rows are read where they are and stored at their places."""
    rows, columns = x.shape
    places = _tiles(rows) if counts_E is None else rows // SIDE + len(counts_E)
    values = torch.empty(columns, places * SIDE, dtype=form.dtype, device=x.device)
    out = Scaled(values, torch.empty(places, columns, device=x.device).t(), (1, SIDE))
    sizes = 1, rows, columns
    return _groups(x.contiguous(), sizes, places * SIDE, out, form, COLUMN, True, floor, power_of_two, counts_E)


def blocks(x: Tensor, form: Format = E4M3, power_of_two: bool = False) -> Scaled:
    """As :func:`sextant.kernels.fp8.scaling.blocks`."""
    lying, turn = as_it_lies(x)
    sizes, values = _sizes(lying, True), torch.empty(x.shape, dtype=form.dtype, device=x.device)
    scale = torch.empty(*x.shape[:-2], _tiles(x.shape[-2]), _tiles(x.shape[-1]), device=x.device)
    return _groups(lying, sizes, sizes[1], Scaled(values, scale, (SIDE, SIDE)), form, BLOCK, turn, FLOOR, power_of_two)


def _groups(
    lying: Tensor, sizes: tuple[int, int, int], tall: int, out: Scaled, form: Format, group: int, turn: bool,
    floor: float, power_of_two: bool, counts_E: Tensor | None = None,
) -> Scaled:
    """Fill ``out``, given for the tensor as it was asked for, from the tensor as it lies."""
    matrices, rows, columns = sizes
    by_row, by_column = out.scale.stride()[-2:][::-1] if turn else out.scale.stride()[-2:]
    by_matrix = out.scale.stride(-3) if out.scale.ndim > 2 else 0
    many = 0 if counts_E is None else powers(len(counts_E))
    _groups_kernel[_grid(columns, tall, matrices)](
        lying, out.values, out.scale, lying if counts_E is None else counts_E, 1 if counts_E is None else len(counts_E),
        rows, tall, columns, by_matrix, by_row, by_column,
        MAX=form.max, FLOOR=floor, GROUP=group, TURN=turn, POWER=power_of_two, MANY=many, SIDE=SIDE, num_warps=8,
    )
    return out


def powers(matrices: int) -> int:
    """A vector's length that holds a number for each matrix."""
    return max(16, triton.next_power_of_2(matrices))


def _sizes(lying: Tensor, apart: bool) -> tuple[int, int, int]:
    """Matrices, rows and columns of a stack; rows of all matrices together unless they are to be kept ``apart``."""
    columns = lying.shape[-1]
    rows = lying.shape[-2] if apart else lying.numel() // columns
    return lying.numel() // (rows * columns), rows, columns


def _tiles(count: int) -> int:
    return -(-count // SIDE)


def _grid(columns: int, rows: int, matrices: int) -> tuple[int, int, int]:
    return _tiles(columns), _tiles(rows), matrices
