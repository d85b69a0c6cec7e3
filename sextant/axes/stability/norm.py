"""Norms over the model width. All compute and return fp32: their output feeds the residual stream or is cast once."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sextant.core.cost import At, Cost
from sextant.core.spec import Spec
from sextant.kernels.norm import rms_norm


class RMSNorm(Spec):
    """``g * x / sqrt(mean(x^2) + eps)``.

    ``unit_offset`` stores the gain as a difference from 1 (Gemma), so that a stored 0 means a gain of 1.
    """

    kind: Literal["rms"] = "rms"
    eps: float = Field(default=1e-6, gt=0)
    unit_offset: bool = False

    def build(self, width: int) -> RMSNormModule:
        return RMSNormModule(self, width)

    def cost(self, width: int, at: At) -> Cost:
        return Cost(width, width, activation_bytes=4 * width)


class LayerNorm(Spec):
    """Mean and variance removed, gain and optional bias (GPT-2, Switch and their time)."""

    kind: Literal["layer"] = "layer"
    eps: float = Field(default=1e-5, gt=0)
    bias: bool = True

    def build(self, width: int) -> LayerNormModule:
        return LayerNormModule(self, width)

    def cost(self, width: int, at: At) -> Cost:
        params = width * (2 if self.bias else 1)
        return Cost(params, params, activation_bytes=4 * width)


AnyNorm = Annotated[RMSNorm | LayerNorm, Field(discriminator="kind")]


class RMSNormModule(nn.Module):
    """``[..., D] -> [..., D]`` in fp32."""

    def __init__(self, spec: RMSNorm, width: int):
        super().__init__()
        self.spec = spec
        self.gain = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        gain_D = self.gain + 1 if self.spec.unit_offset else self.gain
        return rms_norm(x, gain_D, self.spec.eps)

    def fill(self, gain: float) -> None:
        """Set every effective gain to one value."""
        nn.init.constant_(self.gain, gain - 1 if self.spec.unit_offset else gain)


class LayerNormModule(nn.Module):
    """``[..., D] -> [..., D]`` in fp32."""

    def __init__(self, spec: LayerNorm, width: int):
        super().__init__()
        self.spec = spec
        self.gain = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if spec.bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.layer_norm(x, self.gain.shape, self.gain, self.bias, self.spec.eps)

    def fill(self, gain: float) -> None:
        """Set every gain to one value and every bias to 0."""
        nn.init.constant_(self.gain, gain)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
