"""Softmax over all experts, then the A best; gates as they are, or made to sum to one.

Normalised gates equal choosing first and taking the softmax over the chosen. So Mixtral, MiniMax-01, GLaM and Qwen3 are
``normalize``; DBRX too, with MegaBlocks' p-norm (1 as released); MAI-Base-1 and DeepSeekMoE keep the raw probability,
DeepSeek-V2 times 16 inside 3 of 8 groups. With ``bias`` the choice goes by ``p + b`` (2408.15664).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sextant.axes.routing.base import Routing
from sextant.axes.routing.topk import TopK, TopKRouter, jittered
from sextant.core.cost import At, Cost


class SoftmaxTopK(TopK):
    """``p = softmax(x W)``; gates ``p``, or ``p / norm(p of the chosen)``, times ``scale``.

    ``p_norm`` is the norm's exponent, 1 for a sum. While training, the router's input is multiplied by uniform(1 -
    ``jitter``, 1 + ``jitter``).
    """

    kind: Literal["softmax_topk"] = "softmax_topk"
    p_norm: float = Field(default=1.0, gt=0)
    jitter: float = Field(default=0.0, ge=0, lt=1)

    def build(self, width: int, experts: int) -> SoftmaxRouter:
        return SoftmaxRouter(self, width, experts)

    def cost(self, width: int, experts: int, at: At) -> Cost:
        """With jitter the shaken row and its factors are kept besides."""
        shaken = Cost(activation_bytes=8 * width if self.jitter else 0)
        return super().cost(width, experts, at) + shaken


class SoftmaxRouter(TopKRouter):
    """Chooses by logits, whose order is that of the probabilities with fewer ties, or by what bias and groups need."""

    spec: SoftmaxTopK

    def forward(self, x_TD: Tensor, chosen_TA: Tensor | None = None) -> Routing:
        spec, noisy = self.spec, self.training and self.spec.jitter > 0
        logits_TE = self.logits(jittered(x_TD.to(self.weight.dtype), spec.jitter) if noisy else x_TD)
        probs_TE = logits_TE.softmax(-1)
        scores_TE = probs_TE if spec.bias or spec.groups else logits_TE
        experts_TA = self.choose(scores_TE) if chosen_TA is None else chosen_TA
        gates_TA = probs_TE.gather(1, experts_TA)
        if spec.normalize:
            gates_TA = gates_TA / _norm(gates_TA, spec.p_norm)
        return Routing(logits_TE, probs_TE, experts_TA, gates_TA * spec.scale)


def _norm(gates_TA: Tensor, p: float) -> Tensor:
    """``[T, 1]``; gates are not negative, and a sum takes a tenth of torch's norm over so few."""
    if p == 1.0:
        return gates_TA.sum(-1, keepdim=True)
    return torch.linalg.vector_norm(gates_TA, p, dim=-1, keepdim=True)
