"""FP8 tensors with the scales that give their numbers back: one for all, one per tile, one per block.

Tiles and blocks follow DeepSeek-V3 (spec deepseek-v3 5.2, 5.3): a scale is amax / 448, kept in fp32 as the *multiplier*
that restores. Rows that are contracted lie contiguous, as tensor cores want them.

The lines here are the truth and what a CPU runs; on a GPU :mod:`sextant.kernels.fp8.triton_casts` gives the same bits.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from sextant.kernels.fp8.formats import E4M3, Format, saturate

SIDE = 128
"""Width of a tile and of a block."""

FLOOR = 1e-4
"""Smallest amax that an activation or a weight is scaled by."""

GRADIENT_FLOOR = 1e-30
"""The same for gradients: a loss over a global count makes them small, and under 1e-4 they would round to zero."""


@dataclass(frozen=True)
class Scaled:
    """``values`` times ``scale``.

    Attributes:
        values: fp8 ``[..., rows, columns]``.
        scale: fp32; ``[]`` for the whole tensor, else ``[..., ceil(rows / tile[0]), ceil(columns / tile[1])]``.
        tile: rows and columns that share a scale; None when all do.
    """

    values: Tensor
    scale: Tensor
    tile: tuple[int, int] | None = None

    def numbers(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the tensor stands for."""
        return (self.values.float() * self._spread()).to(dtype)

    def _spread(self) -> Tensor:
        if self.tile is None:
            return self.scale
        rows, columns = self.values.shape[-2:]
        tall = self.scale.repeat_interleave(self.tile[0], dim=-2)[..., :rows, :]
        return tall.repeat_interleave(self.tile[1], dim=-1)[..., :columns]

    def turned(self) -> Scaled:
        """The transpose, contiguous: for one scale and for blocks, whose shape it does not change."""
        scale = self.scale if self.tile is None else self.scale.mT.contiguous()
        return Scaled(self.values.mT.contiguous(), scale, self.tile)

    def rows(self, start: int, stop: int) -> Scaled:
        """Some rows; tiles one row high, or one scale for all."""
        scale = self.scale if self.tile is None else self.scale[..., start:stop, :]
        return Scaled(self.values[..., start:stop, :], scale, self.tile)


def restoring(amax: Tensor, form: Format, floor: float, power_of_two: bool = False) -> Tensor:
    """The multiplier for a group: amax over the format's largest value; rounded up to a power of two for UE8M0."""
    scale = amax.float().clamp_min(floor) / form.max
    if not power_of_two:
        return scale
    bits = scale.view(torch.int32)  # adding all ones below the exponent carries into it, unless they were all zero
    return ((bits + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32)


def whole(x: Tensor, scale: Tensor, form: Format) -> tuple[Scaled, Tensor]:
    """One given scale for all: ``x * scale`` is cast, and the count of saturated values comes along."""
    if casts := _casts(x):
        return casts.whole(x, scale, form)
    lying, turn = as_it_lies(x)
    values, saturated = saturate(lying.float() * scale, form)
    cast = Scaled(values, scale.float().reciprocal())
    return cast.turned() if turn else cast, saturated


def remembered(x: Tensor, form: Format, column: int, state: tuple[Tensor, Tensor, Tensor], record: bool) -> Scaled:
    """One scale for all, from a state of ``scale``, ``amax`` and ``saturated``, each of which has this tensor's column.

    A scale of 0, of a tensor without a history, stands for the one that its own largest value asks for. The largest
    magnitude and the count of what saturated are put down in the state when ``record``.
    """
    if casts := _casts(x):
        return casts.remembered(x, form, column, state, record)
    scale, amax, saturated = (part[column] for part in state)
    largest = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32) if x.numel() else torch.zeros_like(scale)
    own = torch.full_like(largest, form.max) / largest.clamp_min(1e-30)  # a number over a tensor rounds otherwise
    cast, over = whole(x, torch.where(scale > 0, scale, own), form)
    if record:
        amax.copy_(torch.maximum(amax, largest))
        saturated.add_(over)
    return cast


def tiles(x: Tensor, form: Format = E4M3, floor: float = FLOOR, power_of_two: bool = False) -> Scaled:
    """Tiles of 1 x 128 along the last axis of ``[..., rows, columns]``; the last tile may be short."""
    if casts := _casts(x):
        return casts.tiles(x, form, floor, power_of_two)
    columns = x.shape[-1]
    parts = F.pad(x.float(), (0, -columns % SIDE)).unflatten(-1, (-1, SIDE))
    scale = restoring(parts.abs().amax(-1), form, floor, power_of_two)
    values, _ = saturate(parts / scale[..., None], form)
    return Scaled(values.flatten(-2)[..., :columns].contiguous(), scale, (1, SIDE))


def tiles_down(
    x: Tensor, form: Format = E4M3, floor: float = FLOOR, power_of_two: bool = False, counts_E: Tensor | None = None
) -> Scaled:
    """:func:`tiles` of the transpose of ``[rows, columns]``, rows padded with zeros to multiples of 128.

    Args:
        x: rows; with counts sorted by matrix.
        counts_E: rows of each matrix, each of which then begins with a tile of its own; there are as many tiles as may
            be needed whatever the counts are, so that no count has to leave the device.
    """
    if casts := _casts(x):
        return casts.tiles_down(x, form, floor, power_of_two, counts_E)
    parts = _placed(x, counts_E).float().unflatten(0, (-1, SIDE))
    scale = restoring(parts.abs().amax(1), form, floor, power_of_two)
    values = saturate(parts / scale[:, None], form)[0].flatten(0, 1)
    return Scaled(values.t().contiguous(), scale.t().contiguous(), (1, SIDE))


def _placed(x_ND: Tensor, counts_E: Tensor | None) -> Tensor:
    """Rows where their tiles are, zeros between."""
    rows = len(x_ND)
    if counts_E is None:
        return F.pad(x_ND, (0, 0, 0, -rows % SIDE))
    tiles_E = (counts_E + SIDE - 1) // SIDE
    shift_E = (tiles_E.cumsum(0) - tiles_E) * SIDE - (counts_E.cumsum(0) - counts_E)
    place_N = torch.arange(rows, device=x_ND.device) + shift_E.repeat_interleave(counts_E, output_size=rows)
    places = (rows // SIDE + len(counts_E)) * SIDE
    return x_ND.new_zeros(places, x_ND.shape[1]).index_copy_(0, place_N, x_ND)


def blocks(x: Tensor, form: Format = E4M3, power_of_two: bool = False) -> Scaled:
    """Blocks of 128 x 128 of ``[..., rows, columns]``; those at the far edges may be short."""
    if casts := _casts(x):
        return casts.blocks(x, form, power_of_two)
    lying, turn = as_it_lies(x)
    rows, columns = lying.shape[-2:]
    padded = F.pad(lying.float(), (0, -columns % SIDE, 0, -rows % SIDE))
    parts = padded.unflatten(-1, (-1, SIDE)).unflatten(-3, (-1, SIDE))
    scale = restoring(parts.abs().amax((-3, -1)), form, FLOOR, power_of_two)
    values, _ = saturate(parts / scale[..., None, :, None], form)
    cast = Scaled(values.flatten(-2).flatten(-3, -2)[..., :rows, :columns].contiguous(), scale, (SIDE, SIDE))
    return cast.turned() if turn else cast


def as_it_lies(x: Tensor) -> tuple[Tensor, bool]:
    """The tensor contiguous, and whether that is its transpose: a transposed view is cast where it lies."""
    if x.ndim > 1 and not x.is_contiguous() and x.mT.is_contiguous():
        return x.detach().mT, True
    return x.detach().contiguous(), False


def _casts(x: Tensor) -> ModuleType | None:
    """What casts on a GPU, if that is where the tensor is; None: the lines here do."""
    return _on_gpu() if x.is_cuda and x.numel() else None


@cache
def _on_gpu() -> ModuleType | None:
    """Our casts in Triton, tried once; None, with a warning, where they cannot be had or are off."""
    try:
        casts = import_module("sextant.kernels.fp8.triton_casts")
        fault = _fault(casts)
    except Exception as error:  # imports and compilers fail in many ways; each means the same here
        fault, casts = f"{type(error).__name__}: {error}", None
    if fault is not None:
        warnings.warn(f"fp8: casts are made of torch's operators, Triton's cannot be used: {fault}", stacklevel=3)
    return casts if fault is None else None


def _fault(casts: ModuleType) -> str | None:
    """Which of a GPU's casts differs in a bit from a CPU's."""
    x = torch.randn(2, 144, 272, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    scale, gpu = torch.tensor(200.0), x.cuda()
    pairs = {
        "whole": (casts.whole(gpu.mT, scale.cuda(), E4M3)[0], whole(x.mT, scale, E4M3)[0]),
        "tiles": (casts.tiles(gpu[0]), tiles(x[0])),
        "tiles_down": (casts.tiles_down(gpu[0]), tiles_down(x[0])),
        "blocks": (casts.blocks(gpu.mT), blocks(x.mT)),
    }
    return next((f"{name} is off" for name, (got, want) in pairs.items() if not _same(got, want)), None)


def _same(got: Scaled, want: Scaled) -> bool:
    values = torch.equal(got.values.cpu().view(torch.uint8), want.values.view(torch.uint8))
    return values and torch.equal(got.scale.cpu(), want.scale)
