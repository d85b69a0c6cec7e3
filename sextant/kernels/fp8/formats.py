"""The two 8-bit floating formats, and the cast that saturates and counts (2209.05433; spec mai-base-1 12.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """One 8-bit floating format.

    Attributes:
        name: as options spell it.
        dtype: torch's.
        max: largest finite value.
        min_normal: smallest value with all digits.
        min_subnormal: smallest value above 0.
        limit: largest fp32 magnitude that rounds to nearest without passing ``max``; what lies above saturates.
    """

    name: str
    dtype: torch.dtype
    max: float
    min_normal: float
    min_subnormal: float
    limit: float


E4M3 = Format("e4m3", torch.float8_e4m3fn, 448.0, 2.0**-6, 2.0**-9, 464.0)
"""Four bits of exponent, three of mantissa, no infinity: a tie between 448 and the code of NaN rounds to 448."""

E5M2 = Format("e5m2", torch.float8_e5m2, 57344.0, 2.0**-14, 2.0**-16, 61440.0 - 2.0**-8)
"""Five bits of exponent, two of mantissa, with infinity: a tie at 61440 would round to it, the fp32 below does not."""

FORMATS = {form.name: form for form in (E4M3, E5M2)}


def saturate(x: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Cast to nearest, ties to even; beyond the format's range the largest value of that sign, never infinity.

    Returns:
        The fp8 tensor, and an int64 scalar: values that saturated, infinities among them. NaN stays NaN.
    """
    x = x.float()
    saturated = (x.abs() > form.limit).sum()
    return x.clamp(-form.max, form.max).to(form.dtype), saturated


def quantise(x: Tensor, scale: Tensor | float, form: Format) -> tuple[Tensor, Tensor]:
    """``x * scale`` as fp8, and how many values saturated; the product is formed in fp32."""
    return saturate(x.float() * scale, form)
