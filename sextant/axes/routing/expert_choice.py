"""Experts choose tokens: each takes its C best, so load is even by construction (2202.09368).

``S = softmax(x W)`` over experts; expert e takes the ``C = ceil(T c / E)`` tokens with the largest ``S``; the gate is
``S``. A token meets between none and all experts, ``c`` on average. **Not causal**: whether a token is taken depends on
all other tokens of the call, later ones and other sequences included; so training leaks, and a decoding step, where few
tokens compete, is another function than training.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sextant.axes.routing.base import Router, RouterModule, Routing, best
from sextant.core.cost import At, Cost


class ExpertChoice(Router):
    """``top_k`` is ``c``, the experts that a token meets on average (the paper's capacity factor)."""

    causal: ClassVar[bool] = False
    kind: Literal["expert_choice"] = "expert_choice"
    top_k: int = Field(ge=1)

    def build(self, width: int, experts: int) -> ExpertChoiceRouter:
        return ExpertChoiceRouter(self, width, experts)

    def places(self, experts: int) -> int:
        return experts

    def cost(self, width: int, experts: int, at: At) -> Cost:
        """Expert, gate and whether it took the token, for every expert."""
        return super().cost(width, experts, at) + Cost(activation_bytes=13 * experts)


class ExpertChoiceRouter(RouterModule):
    """The record has a place for every expert: A = E, those that took the token first, ``sent_TA`` telling which."""

    def __init__(self, spec: ExpertChoice, width: int, experts: int):
        super().__init__(width, experts)
        self.spec = spec

    def forward(self, x_TD: Tensor, chosen_TA: Tensor | None = None) -> Routing:
        logits_TE = self.logits(x_TD)
        probs_TE = logits_TE.softmax(-1)
        if chosen_TA is not None:  # a record tells besides which of its copies arrived
            return Routing(logits_TE, probs_TE, chosen_TA, probs_TE.gather(1, chosen_TA))
        experts_TA, sent_TA = self._taken(probs_TE.detach())
        gates_TA = probs_TE.gather(1, experts_TA) * sent_TA
        return Routing(logits_TE, probs_TE, experts_TA, gates_TA, kept_TA=sent_TA, sent_TA=sent_TA)

    def _taken(self, probs_TE: Tensor) -> tuple[Tensor, Tensor]:
        tokens, experts = probs_TE.shape
        capacity = -(-tokens * self.spec.top_k // experts)
        is_taken_ET = torch.zeros_like(probs_TE.T, dtype=torch.bool).scatter(1, best(probs_TE.T, capacity), True)
        order_TA = best(probs_TE.masked_fill(~is_taken_ET.T, -1.0), experts)
        return order_TA, is_taken_ET.T.gather(1, order_TA)
