"""GShard's top-2: gates share one, and the second expert is met with a chance that grows with its gate (2006.16668).

Gates are ``g1, g2 = p1, p2 over p1 + p2``, also where the second is left out: the first then keeps ``g1`` below one.
The sources differ on the chance (MAI-Base-1, section 10.2): the text has it proportional to ``g2``, Algorithm 1 tests
``2 g2``, which reaches 1 as ``g2`` is at most a half, and Mesh-TensorFlow ``g2 / 0.2``. Evaluation takes both.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sextant.axes.routing.base import Router, RouterModule, Routing, best

CHANCE: dict[str, float] = {"algorithm": 2.0, "text": 1.0, "mesh_tf": 5.0}
"""Chance of the second expert, per unit of its gate."""


class GShard(Router):
    """Two experts by ``softmax(x W)``. ``second`` says how often the second is met while training."""

    kind: Literal["gshard"] = "gshard"
    top_k: int = Field(default=2, ge=2, le=2)
    second: Literal["algorithm", "text", "mesh_tf", "always"] = "algorithm"

    def build(self, width: int, experts: int) -> GShardRouter:
        return GShardRouter(self, width, experts)


class GShardRouter(RouterModule):
    """Draws one number per token from torch's own generator; not in a replay, whose record tells who arrived."""

    def __init__(self, spec: GShard, width: int, experts: int):
        super().__init__(width, experts)
        self.spec = spec

    def forward(self, x_TD: Tensor, chosen_TA: Tensor | None = None) -> Routing:
        logits_TE = self.logits(x_TD)
        probs_TE = logits_TE.softmax(-1)
        experts_TA = best(logits_TE, 2) if chosen_TA is None else chosen_TA
        gates_TA = probs_TE.gather(1, experts_TA)
        gates_TA = gates_TA / gates_TA.sum(-1, keepdim=True)
        if not self.training or self.spec.second == "always" or chosen_TA is not None:
            return Routing(logits_TE, probs_TE, experts_TA, gates_TA)
        sent_TA = self._drawn(gates_TA.detach())
        return Routing(logits_TE, probs_TE, experts_TA, gates_TA * sent_TA, kept_TA=sent_TA, sent_TA=sent_TA)

    def _drawn(self, gates_TA: Tensor) -> Tensor:
        """Which copies are sent: the first always."""
        chance_TA = CHANCE[self.spec.second] * gates_TA
        chance_TA[:, 0] = 1.0
        draw_TA = torch.rand_like(gates_TA[:, :1]).expand_as(gates_TA)
        return draw_TA < chance_TA
