"""DeepSeek-V3's router: sigmoid affinities, a biased choice inside groups, gates from the affinities alone.

2412.19437, section 2.1.2; DeepSeek-V3, section 2.2: ``s = sigmoid(x W)``; the choice goes by ``s + b`` inside the kept
groups; gates are ``s / (sum of the chosen s + 1e-20) * scale``. Nemotron 3 has no groups and another scale.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from sextant.axes.routing.base import Routing
from sextant.axes.routing.topk import TopK, TopKRouter
from sextant.core.cost import At, Cost

TINY = 1e-20
"""Of the released code: affinities that all underflow give gates of 0, not NaN."""


class SigmoidTopK(TopK):
    """``s = sigmoid(x W)``; gates ``s``, or ``s / sum of the chosen``, times ``scale``."""

    kind: Literal["sigmoid_topk"] = "sigmoid_topk"
    normalize: bool = True
    bias: bool = True

    def build(self, width: int, experts: int) -> SigmoidRouter:
        return SigmoidRouter(self, width, experts)

    def cost(self, width: int, experts: int, at: At) -> Cost:
        """Affinities and their logarithms are kept besides."""
        return super().cost(width, experts, at) + Cost(activation_bytes=8 * experts)


class SigmoidRouter(TopKRouter):
    """``probs_TE`` is ``s / sum of all s``, as the sequence-wise balance loss reads it."""

    def forward(self, x_TD: Tensor, chosen_TA: Tensor | None = None) -> Routing:
        logits_TE = self.logits(x_TD)
        affinity_TE = logits_TE.sigmoid()
        probs_TE = F.logsigmoid(logits_TE).softmax(-1)  # s / sum s, also where every s underflows
        experts_TA = self.choose(affinity_TE) if chosen_TA is None else chosen_TA
        gates_TA = affinity_TE.gather(1, experts_TA)
        if self.spec.normalize:
            gates_TA = gates_TA / (gates_TA.sum(-1, keepdim=True) + TINY)
        return Routing(logits_TE, probs_TE, experts_TA, gates_TA * self.spec.scale)
