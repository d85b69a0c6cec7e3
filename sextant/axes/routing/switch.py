"""Switch: one expert per token, whose gate is its probability (2101.03961; MAI-Base-1, section 10.2).

With one expert a normalised gate would be 1 and the router would learn nothing from the output. Switch trains with
jitter 1e-2, and starts matrices from a truncated normal of variance ``0.1 / inputs``, a tenth of the usual.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sextant.axes.routing.base import Router
from sextant.axes.routing.softmax_topk import SoftmaxRouter, SoftmaxTopK
from sextant.core.cost import At, Cost


class Switch(Router):
    """``p = softmax(x W)``; the largest wins; its gate is ``p``. ``jitter`` shakes the input while training."""

    kind: Literal["switch"] = "switch"
    top_k: int = Field(default=1, ge=1, le=1)
    jitter: float = Field(default=1e-2, ge=0, lt=1)

    def build(self, width: int, experts: int) -> SoftmaxRouter:
        return self._softmax().build(width, experts)

    def cost(self, width: int, experts: int, at: At) -> Cost:
        return self._softmax().cost(width, experts, at)

    def _softmax(self) -> SoftmaxTopK:
        return SoftmaxTopK(top_k=1, jitter=self.jitter)
