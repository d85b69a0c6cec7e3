"""The plain policies, and the paths that stay fp32 under every policy (MAI-Base-1 keeps the same list)."""

from __future__ import annotations

from typing import Literal

import torch

from sextant.axes.numerics.base import Numerics

FP32_PATHS: dict[str, str] = {
    "parameters": "master weights: updates far below a bf16 step must not be lost; products cast a copy",
    "embedding": "rows are looked up, not multiplied: fp32 costs little and starts the residual stream exactly",
    "residual stream": "errors would be amplified from layer to layer",
    "norms": "a mean of squares needs the range and the digits",
    "attention scores": "pre-softmax: kernels accumulate and normalise in fp32",
    "router": "weights, logits and gates: rounded logits choose other experts",
    "expert combine": "a sum over experts of unequal gates",
    "output logits": "pre-softmax: the product runs in the compute dtype with fp32 accumulation, then all is fp32",
    "loss": "a sum over many tokens",
    "gradients": "accumulated in the masters' dtype over micro-batches and ranks",
    "optimiser state": "second moments span many orders of magnitude",
}
"""Path -> why it is fp32. ``sextant audit`` reads each off a real step."""


class FP32(Numerics):
    """Everything in the parameters' own dtype: fp32 in runs, fp64 in tests."""

    kind: Literal["fp32"] = "fp32"

    @property
    def compute(self) -> torch.dtype | None:
        return None


class BF16(Numerics):
    """Matrix products in bf16, the paths of :data:`FP32_PATHS` in fp32."""

    kind: Literal["bf16"] = "bf16"

    @property
    def compute(self) -> torch.dtype | None:
        return torch.bfloat16
