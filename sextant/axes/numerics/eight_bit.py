"""Frozen matrices in 8 bits for serving: numbers with scales, restored by whatever multiplies by them.

Weights alone are lowered: rows, keys and values, norms, router, embedding and head stay as they are. A product restores
its matrix first, so memory falls and time does not; of a stack of experts only those that are met are restored.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sextant.kernels.fp8 import SIDE, Scaled, blocks

EightBitKind = Literal["fp8", "int8"]


class EightBit(Tensor):
    """A matrix ``[out, in]``, or a stack of them, that reads as a tensor of ``dtype`` and holds 8 bits a number."""

    scaled: Scaled

    @staticmethod
    def __new__(cls, scaled: Scaled, dtype: torch.dtype) -> EightBit:
        values = scaled.values
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=dtype, device=values.device)  # type: ignore[attr-defined]

    def __init__(self, scaled: Scaled, dtype: torch.dtype):
        self.scaled = scaled

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Views and choices of whole matrices stay 8-bit; to everything else the numbers are given."""
        keep = _KEEPS.get(func.overloadpacket)
        # A view of an ordinary tensor has to be one, in inference too.
        with torch.inference_mode(False) if func.is_view or keep is not None else nullcontext():
            kept = keep(*args) if keep is not None and isinstance(args[0], cls) else None
            if kept is not None:
                return kept
            args, kwargs = tree_map_only(cls, cls.numbers, (args, kwargs or {}))
            return func(*args, **kwargs)

    def numbers(self) -> Tensor:
        """What it stands for, restored in fp32 and rounded once."""
        return self.scaled.numbers(self.dtype)

    @property
    def held_bytes(self) -> int:
        """Of numbers and scales."""
        return self.scaled.values.nbytes + self.scaled.scale.nbytes

    def __repr__(self, **_options: Any) -> str:  # type: ignore[override]
        return f"EightBit({list(self.shape)}, {self.scaled.values.dtype} for {self.dtype})"


def _same(x: EightBit, *_rest: Any) -> EightBit:
    return EightBit(x.scaled, x.dtype)


def _cast(x: EightBit, dtype: Any = None, *_rest: Any) -> EightBit | None:
    return x if dtype == x.dtype else None


def _select(x: EightBit, dim: int = 0, index: int = 0) -> EightBit | None:
    if x.ndim < 3 or dim != 0:
        return None
    return EightBit(Scaled(x.scaled.values[index], x.scaled.scale[index], x.scaled.tile), x.dtype)


def _unbind(x: EightBit, dim: int = 0) -> tuple[EightBit | None, ...] | None:
    return None if x.ndim < 3 or dim != 0 else tuple(_select(x, 0, index) for index in range(len(x)))


_aten = torch.ops.aten
_KEEPS: dict[Any, Callable[..., Any]] = {
    _aten.detach: _same, _aten.alias: _same, _aten.to: _cast, _aten.select: _select, _aten.unbind: _unbind,
}


def eight_bit(x: Tensor, kind: EightBitKind, dtype: torch.dtype) -> EightBit:
    """A matrix, or a stack, in 8 bits.

    ``fp8`` is E4M3 with a scale for each 128 by 128 (error at most 16/448 of the largest there), ``int8`` whole numbers
    up to 127 with a scale for each 128 of a row (error at most 1/254).

    Args:
        dtype: what it is restored to.
    """
    return EightBit(blocks(x) if kind == "fp8" else whole_numbers(x), dtype)


def whole_numbers(x: Tensor) -> Scaled:
    """int8 with a scale for each 128 of the last axis of ``[..., rows, columns]``; zeros stay zeros."""
    columns = x.shape[-1]
    parts = F.pad(x.float(), (0, -columns % SIDE)).unflatten(-1, (-1, SIDE))
    scale = parts.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny * 127) / 127
    values = (parts / scale[..., None]).round().clamp(-127, 127).to(torch.int8)
    return Scaled(values.flatten(-2)[..., :columns].contiguous(), scale, (1, SIDE))
