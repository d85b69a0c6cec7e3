"""FP8 tensors with the scales that give their numbers back: one for all, one per tile, one per block.

Tiles and blocks follow DeepSeek-V3 (spec deepseek-v3 5.2, 5.3): a scale is amax / 448, kept in fp32 as the *multiplier*
that restores. Rows that are contracted lie contiguous, as tensor cores want them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sextant.kernels.fp8.formats import E4M3, Format, saturate
from sextant.kernels.fp8.fuse import fused

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
    if _turned(x):
        cast, saturated = whole(x.mT, scale, form)
        return cast.turned(), saturated
    values, saturated = _whole(x.detach().contiguous().flatten(), scale, form)
    return Scaled(values.view(x.shape), scale.float().reciprocal()), saturated


def tiles(x: Tensor, form: Format = E4M3, floor: float = FLOOR, power_of_two: bool = False) -> Scaled:
    """Tiles of 1 x 128 along the last axis of ``[..., rows, columns]``; the last tile may be short."""
    values, scale = _tiles(x.detach().contiguous().flatten(0, -2), form, floor, power_of_two)
    return Scaled(values.view(x.shape), scale.unflatten(0, x.shape[:-1]), (1, SIDE))


def tiles_down(x: Tensor, form: Format = E4M3, floor: float = FLOOR, power_of_two: bool = False) -> Scaled:
    """:func:`tiles` of the transpose of ``[rows, columns]``, rows a multiple of 128: only bytes change places."""
    values, scale = _tiles_down(x.detach().contiguous(), form, floor, power_of_two)
    return Scaled(values.t().contiguous(), scale.t().contiguous(), (1, SIDE))


def blocks(x: Tensor, form: Format = E4M3, power_of_two: bool = False) -> Scaled:
    """Blocks of 128 x 128 of ``[..., rows, columns]``; those at the far edges may be short."""
    if _turned(x):
        return blocks(x.mT, form, power_of_two).turned()
    return Scaled(*_blocks(x.detach().contiguous(), form, power_of_two), (SIDE, SIDE))


def _turned(x: Tensor) -> bool:
    """Whether a transposed view lies contiguous the other way round: it is cast as it lies, and bytes are turned."""
    return x.ndim > 1 and not x.is_contiguous() and x.mT.is_contiguous()


# Shapes are made alike before these, so that each is compiled for few kinds of argument.


@fused
def _whole(x: Tensor, scale: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    return saturate(x.float() * scale, form)


@fused
def _tiles(x: Tensor, form: Format, floor: float, power_of_two: bool) -> tuple[Tensor, Tensor]:
    columns = x.shape[-1]
    parts = F.pad(x.float(), (0, -columns % SIDE)).unflatten(-1, (-1, SIDE))
    scale = restoring(parts.abs().amax(-1), form, floor, power_of_two)
    values, _ = saturate(parts / scale[..., None], form)
    return values.flatten(-2)[..., :columns].contiguous(), scale


@fused
def _tiles_down(x: Tensor, form: Format, floor: float, power_of_two: bool) -> tuple[Tensor, Tensor]:
    parts = x.float().unflatten(0, (-1, SIDE))
    scale = restoring(parts.abs().amax(1), form, floor, power_of_two)
    return saturate(parts / scale[:, None], form)[0].flatten(0, 1), scale


@fused
def _blocks(x: Tensor, form: Format, power_of_two: bool) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape[-2:]
    padded = F.pad(x.float(), (0, -columns % SIDE, 0, -rows % SIDE))
    parts = padded.unflatten(-1, (-1, SIDE)).unflatten(-3, (-1, SIDE))
    scale = restoring(parts.abs().amax((-3, -1)), form, FLOOR, power_of_two)
    values, _ = saturate(parts / scale[..., None, :, None], form)
    return values.flatten(-2).flatten(-3, -2)[..., :rows, :columns].contiguous(), scale
