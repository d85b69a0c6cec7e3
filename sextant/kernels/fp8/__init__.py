"""Products of fp8 tensors with scales: one function whatever the machine offers, and a word on what was chosen.

A CPU restores the numbers and multiplies in fp32, which is exact up to the order of the sum. A GPU takes the first that
works of torch's scaled product and our Triton kernel (the other way round where counts would have to leave the device),
else bf16 products of restored numbers. A way is tried on small operands of the same kind first, against the reference;
one that raises or is off is left out, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from sextant.kernels.fp8.formats import E4M3, E5M2, FORMATS, Format, quantise, saturate
from sextant.kernels.fp8.reference import columns_reference, rows_reference
from sextant.kernels.fp8.scaling import (
    FLOOR,
    GRADIENT_FLOOR,
    SIDE,
    Scaled,
    blocks,
    remembered,
    restoring,
    tiles,
    tiles_down,
    whole,
)

WAYS: dict[str, tuple[str, str, str]] = {
    "reference": ("reference", "rows_reference", "columns_reference"),
    "scaled_mm": ("scaled_mm", "rows_each", "columns_each"),
    "triton": ("triton_kernels", "rows_grouped", "columns_grouped"),
    "bf16": ("reference", "rows_in_bf16", "columns_in_bf16"),
}
"""Way -> its file, and its functions for :func:`rows_product` and :func:`columns_product`."""

TOLERANCE = 2e-2
"""What a way may be off by on its trial, relative to the largest value: results are bf16, sums may have 14 bits."""


class Choice(NamedTuple):
    """What was chosen for a kind of product."""

    kind: str
    way: str
    function: Callable[..., Tensor]


_chosen: dict[tuple[Hashable, ...], Choice] = {}
_only: list[str] = []


def rows_product(x: Scaled, weight: Scaled, counts_E: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``y_NF``: rows ``[N, D]`` times the matrix ``[F, D]`` of ``[E, F, D]`` that each belongs to.

    Args:
        x: rows, sorted by matrix; one scale for all, or tiles along D.
        weight: one scale for all, tiles or blocks, as ``x``.
        counts_E: int64, rows of each matrix; None when there is one matrix.
        dtype: of the result; sums are fp32.
    """
    return _way("rows", x, weight, counts_E is not None)(x, weight, counts_E, dtype)


def columns_product(dy: Scaled, x: Scaled, tiles_E: Tensor | None) -> Tensor:
    """``dw_EFD`` in fp32: ``[F, N]`` times ``[D, N]`` over the tiles of N that each matrix owns.

    Args:
        dy, x: tiles along N.
        tiles_E: int64, tiles of each matrix, which lie one after another; what is left of N belongs to none. None when
            there is one matrix, which all belong to.
    """
    return _way("columns", dy, x, tiles_E is not None)(dy, x, tiles_E)


def paths() -> dict[str, str]:
    """Kind of product -> the way it takes on this machine, of those met so far."""
    return {choice.kind: choice.way for choice in _chosen.values()}


def only(way: str | None) -> None:
    """Restrict a GPU's and a CPU's choice to one way, for benches and tests; None lifts it."""
    _only[:] = [] if way is None else [way]
    _chosen.clear()


def _way(what: str, left: Scaled, right: Scaled, many: bool) -> Callable[..., Tensor]:
    key = what, many, left.values.is_cuda, left.values.dtype, right.values.dtype, right.tile
    if key not in _chosen:
        kind = _kind(what, left, right, many)
        way = _choose(what, left, right, many, kind)
        _chosen[key] = Choice(kind, way, _function(way, what))
    return _chosen[key].function


def _kind(what: str, left: Scaled, right: Scaled, many: bool) -> str:
    scales = "whole" if right.tile is None else "x".join(map(str, right.tile))
    formats = " by ".join(str(of.values.dtype).removeprefix("torch.float8_") for of in (left, right))
    place = left.values.device.type
    return f"{place} {what} {'of experts' if many else 'of one matrix'}, {formats}, scale {scales}"


def _function(way: str, what: str) -> Callable[..., Tensor]:
    file, rows, columns = WAYS[way]
    return getattr(import_module(f"sextant.kernels.fp8.{file}"), rows if what == "rows" else columns)


def _choose(what: str, left: Scaled, right: Scaled, many: bool, kind: str) -> str:
    if _only:
        return _only[0]
    if not left.values.is_cuda:
        return "reference"
    for way in ("triton", "scaled_mm") if many else ("scaled_mm", "triton"):
        fault = _fault(way, what, left, right, many)
        if fault is None:
            return way
        warnings.warn(f"fp8: {way} cannot serve {kind}: {fault}", stacklevel=4)
    return "bf16"


def _fault(way: str, what: str, left: Scaled, right: Scaled, many: bool) -> str | None:
    """Why a way cannot be used: an error, or a wrong result on small operands of the same kind; None when it can."""
    try:
        got, want = (_trial(one, what, left, right, many) for one in (way, "reference"))
    except Exception as error:  # libraries and compilers refuse in many ways; each means the same here
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
    off = ((got - want).abs().max() / want.abs().max()).item()
    return None if off < TOLERANCE else f"off by {off:.1e} of the largest value"


def _trial(way: str, what: str, left: Scaled, right: Scaled, many: bool) -> Tensor:
    """Rows of 3 and 200 (tiles of 1 and 2) and matrices of 160 by 256, drawn from a fixed seed."""
    device, matrices = left.values.device, 2 if many else 1
    draw = torch.Generator().manual_seed(1)
    sizes = torch.tensor(([1, 2] if what == "columns" else [3, 200])[-matrices:], device=device)
    total = int(sizes.sum()) * (SIDE if what == "columns" else 1)
    shapes = ((160, total), (256, total)) if what == "columns" else ((total, 256), (matrices, 160, 256))
    like = zip((left, right), shapes, strict=True)
    operands = [_like(of, torch.randn(shape, generator=draw).to(device)) for of, shape in like]
    rest = (sizes if many else None, torch.bfloat16)[: 1 if what == "columns" else 2]
    return _function(way, what)(*operands, *rest).float()


def _like(of: Scaled, x: Tensor) -> Scaled:
    form = next(form for form in FORMATS.values() if form.dtype == of.values.dtype)
    if of.tile is None:
        return whole(x, torch.tensor(16.0, device=x.device), form)[0]
    return tiles(x, form) if of.tile[0] == 1 else blocks(x, form)


__all__ = [
    "E4M3", "E5M2", "FLOOR", "FORMATS", "GRADIENT_FLOOR", "SIDE", "WAYS", "Format", "Scaled", "blocks",
    "columns_product", "columns_reference", "only", "paths", "quantise", "remembered", "restoring", "rows_product",
    "rows_reference", "saturate", "tiles", "tiles_down", "whole",
]
