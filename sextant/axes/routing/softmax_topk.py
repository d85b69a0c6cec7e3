"""Softmax over all experts, then the A best; gates as they are, or made to sum to one.

Normalised gates equal choosing first and taking the softmax over the chosen (Mixtral, DBRX); unnormalised ones are
MAI-Base-1's and DeepSeek-V2's. Ties go to the lower expert number, so that routing repeats bit for bit.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sextant.axes.routing.base import Router, RouterModule, Routing, best
from sextant.axes.stability import Role


class SoftmaxTopK(Router):
    """``p = softmax(x W)``; the ``top_k`` largest win; gates ``p`` or ``p / sum of the chosen``, times ``scale``."""

    kind: Literal["softmax_topk"] = "softmax_topk"
    top_k: int = Field(ge=1)
    normalize: bool = False
    scale: float = Field(default=1.0, gt=0)

    def build(self, width: int, experts: int) -> SoftmaxRouter:
        return SoftmaxRouter(self, width, experts)


class SoftmaxRouter(RouterModule):
    """``weight`` is [E, D], fp32."""

    role = Role.ROUTER

    def __init__(self, spec: SoftmaxTopK, width: int, experts: int):
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(experts, width))

    def forward(self, x_TD: Tensor, chosen_TA: Tensor | None = None) -> Routing:
        logits_TE = F.linear(x_TD.to(self.weight.dtype), self.weight)
        probs_TE = logits_TE.softmax(-1)
        experts_TA = best(logits_TE, self.spec.top_k) if chosen_TA is None else chosen_TA
        gates_TA = probs_TE.gather(1, experts_TA)
        if self.spec.normalize:
            gates_TA = gates_TA / gates_TA.sum(-1, keepdim=True)
        return Routing(logits_TE, probs_TE, experts_TA, gates_TA * self.spec.scale)
