"""Position codes, chosen per layer: rotary (full, partial, half-split or interleaved, scaled), none, and ALiBi.

Rotary turns pairs of channels of q and k by an angle that grows with the position, so a score depends on the
distance alone (2104.09864). ALiBi subtracts a slope times the distance from the score (2108.12409).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sextant.core.spec import Spec
from sextant.core.stream import Stream


class LinearScaling(Spec):
    """Positions divided by ``factor`` (position interpolation, 2306.15595; Gemma 3's global layers)."""

    kind: Literal["linear"] = "linear"
    factor: float = Field(ge=1)

    def scale(self, frequencies: Tensor, base: float) -> tuple[Tensor, float]:
        """Scaled frequencies and the factor on cosine and sine."""
        return frequencies / self.factor, 1.0


class Llama3Scaling(Spec):
    """Llama 3.1's rule: long waves are slowed by ``factor``, short ones kept, a linear ramp between."""

    kind: Literal["llama3"] = "llama3"
    factor: float = Field(ge=1)
    low_factor: float = Field(default=1.0, gt=0)
    high_factor: float = Field(default=4.0, gt=0)
    original: int = Field(ge=1, description="context length of pre-training")

    @model_validator(mode="after")
    def _ordered(self) -> Llama3Scaling:
        if self.low_factor >= self.high_factor:
            raise ValueError("low_factor must be below high_factor")
        return self

    def scale(self, frequencies: Tensor, base: float) -> tuple[Tensor, float]:
        """Scaled frequencies and the factor on cosine and sine."""
        turns = self.original * frequencies / (2 * math.pi)
        kept = ((turns - self.low_factor) / (self.high_factor - self.low_factor)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor), 1.0


class YaRNScaling(Spec):
    """YaRN (2309.00071): interpolate channels that turn less than ``beta_slow`` times over the original context, keep
    those that turn more than ``beta_fast`` times, and raise the temperature of the scores.

    ``attention_factor`` multiplies cosine and sine; None takes ``0.1 mscale ln(factor) + 1`` (over the same with
    ``mscale_all_dim`` when that is set, as DeepSeek does).
    """

    kind: Literal["yarn"] = "yarn"
    factor: float = Field(ge=1)
    original: int = Field(ge=1, description="context length of pre-training")
    beta_fast: float = Field(default=32.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)
    attention_factor: float | None = None
    mscale: float = 1.0
    mscale_all_dim: float | None = None
    truncate: bool = True

    @model_validator(mode="after")
    def _ordered(self) -> YaRNScaling:
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast {self.beta_fast:g} must not be below beta_slow {self.beta_slow:g}")
        return self

    @property
    def score_scale(self) -> float:
        """What DeepSeek multiplies whole scores by, rotary or not: ``(0.1 mscale_all_dim ln(factor) + 1)^2``."""
        return self._mscale(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def scale(self, frequencies: Tensor, base: float) -> tuple[Tensor, float]:
        """Scaled frequencies and the factor on cosine and sine."""
        low, high = self._edge(self.beta_fast, frequencies, base), self._edge(self.beta_slow, frequencies, base)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * len(frequencies) - 1)
        channel = torch.arange(len(frequencies), dtype=frequencies.dtype, device=frequencies.device)
        slowed = ((channel - low) / max(high - low, 0.001)).clamp(0, 1)
        return frequencies * ((1 - slowed) + slowed / self.factor), self.temperature

    def _edge(self, turns: float, frequencies: Tensor, base: float) -> float:
        """The channel that turns this many times over the original context."""
        return len(frequencies) * math.log(self.original / (turns * 2 * math.pi)) / math.log(base)

    @property
    def temperature(self) -> float:
        """What cosine and sine are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        return self._mscale(self.mscale) / (self._mscale(self.mscale_all_dim) if self.mscale_all_dim else 1.0)

    def _mscale(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


AnyScaling = Annotated[LinearScaling | Llama3Scaling | YaRNScaling, Field(discriminator="kind")]


class RoPE(Spec):
    """Rotary position code on the first ``fraction`` of the head width.

    ``layout`` says which channels make a pair: ``half`` pairs i with i + n/2, ``interleaved`` 2i with 2i + 1. They are
    different weights. The exponent uses the rotary width, also when it is partial. That width is the whole part of
    ``fraction`` times the head width: 0.3 of 16 turns 4 channels. It must be even and not 0.
    """

    kind: Literal["rope"] = "rope"
    base: float = Field(default=10_000.0, gt=1)
    fraction: float = Field(default=1.0, gt=0, le=1)
    layout: Literal["half", "interleaved"] = "half"
    scaling: AnyScaling | None = None

    def build(self, heads: int, head_dim: int) -> Rotary:
        return Rotary(self, head_dim)

    def rotary_dim(self, head_dim: int) -> int:
        """Channels that turn.

        Raises:
            ValueError: none, or an odd number.
        """
        turning = int(head_dim * self.fraction)
        if turning < 2 or turning % 2:
            part = f"{self.fraction:g} of {head_dim}"
            raise ValueError(f"rotary width {turning} must be even and at least 2, here it is {part}")
        return turning


class NoPE(Spec):
    """No position code; order is known only through causality (MAI-Base-1's global layers)."""

    kind: Literal["nope"] = "nope"

    def build(self, heads: int, head_dim: int) -> Unturned:
        return Unturned()


class ALiBi(Spec):
    """A slope per head on the distance; ``2^(-8 h / H)`` for powers of two, the paper's interleaving otherwise."""

    kind: Literal["alibi"] = "alibi"

    def build(self, heads: int, head_dim: int) -> Slopes:
        return Slopes(heads)


AnyPosition = Annotated[RoPE | NoPE | ALiBi, Field(discriminator="kind")]


class Unturned(nn.Module):
    """Leaves q and k alone."""

    slopes_H: Tensor | None

    def __init__(self, slopes_H: Tensor | None = None):
        super().__init__()
        self.register_buffer("slopes_H", slopes_H, persistent=False)

    def forward(self, q_THK: Tensor, k_TGK: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        return q_THK, k_TGK


class Slopes(Unturned):
    """Leaves q and k alone and gives each head the slope that its scores fall with."""

    def __init__(self, heads: int):
        super().__init__(alibi_slopes(heads))


class Rotary(nn.Module):
    """Turns q and k in fp32 by angles computed from positions; no tables, so no maximal length."""

    slopes_H: Tensor | None = None

    def __init__(self, spec: RoPE, head_dim: int):
        super().__init__()
        self.code = f"{head_dim}/{spec.model_dump_json()}"
        self.dim = spec.rotary_dim(head_dim)
        self.interleaved = spec.layout == "interleaved"
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float64, device="cpu") / self.dim
        frequencies, self.magnitude = spec.base**-exponents, 1.0
        if spec.scaling is not None:
            frequencies, self.magnitude = spec.scaling.scale(frequencies, spec.base)
        self.frequencies = frequencies.tolist()

    def forward(self, q_THK: Tensor, k_TGK: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        cos, sin = stream.turns.get(self.code) or self.turns(stream.positions_T, q_THK.dtype)
        if torch.is_grad_enabled():
            return self._turn(q_THK, cos, sin), self._turn(k_TGK, cos, sin)
        both = self._turn(torch.cat((q_THK, k_TGK), dim=1), cos, sin)  # a decoding step pays for calls, not for rows
        return both[:, : q_THK.shape[1]], both[:, q_THK.shape[1] :]

    def turns(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What a channel and its partner are multiplied by, ``[T, 1, K]`` in fp32 (fp64 for fp64): the cosine, and the
        sine with the sign of the channel's side. The same for every layer with this code.
        """
        dtype = torch.promote_types(dtype, torch.float32)
        frequencies = torch.tensor(self.frequencies, dtype=dtype, device=positions_T.device)
        angles = positions_T[:, None, None].to(dtype) * frequencies
        cos, sin = angles.cos() * self.magnitude, angles.sin() * self.magnitude
        return self._join(cos, cos), self._join(-sin, sin)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turning = x[..., : self.dim] if self.dim < x.shape[-1] else x
        turned = (turning * cos + self._partners(turning) * sin).to(x.dtype)
        return turned if self.dim == x.shape[-1] else torch.cat((turned, x[..., self.dim :]), dim=-1)

    def _partners(self, x: Tensor) -> Tensor:
        """Every channel's partner in its pair."""
        return self._join(x[..., 1::2], x[..., 0::2]) if self.interleaved else x.roll(self.dim // 2, -1)

    def _join(self, a: Tensor, b: Tensor) -> Tensor:
        """First and second channels of the pairs, back in their places."""
        return torch.stack((a, b), dim=-1).flatten(-2) if self.interleaved else torch.cat((a, b), dim=-1)


def turned(position: nn.Module, x_THK: Tensor, places_T: Tensor) -> Tensor:
    """Rows with the code of the places that are given, whatever their own: blocks at their first token, a constant."""
    ends = torch.tensor([0, len(places_T)], dtype=torch.int32, device=places_T.device)
    return position(x_THK, x_THK, Stream(places_T, ends, len(places_T)))[0]


def alibi_slopes(heads: int) -> Tensor:
    """``2^(-8 h / H)`` for a power of two; else those of the next lower one, then every second of its double."""
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (h + 1) / whole) for h in range(whole)]
    extra = [2 ** (-4 * (h + 1) / whole) for h in range(0, 2 * (heads - whole), 2)]
    return torch.tensor(slopes + extra)
