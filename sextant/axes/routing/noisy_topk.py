"""The first sparse router: noise of a learned size on the logits, softmax over the A kept (1701.06538).

``h = x Wg + normal * softplus(x Wn)``; gates are the softmax over the A largest ``h``; without noise in evaluation.
Both matrices start at 0, so that at first only the noise chooses. Appendix A's smooth load is the chance that expert i
stays among the A best when its own noise is drawn again: ``Phi((x Wg - t) / softplus(x Wn))``, with ``t`` the A-th
largest ``h`` of the other experts.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sextant.axes.routing.base import Router, RouterModule, Routing, best
from sextant.core.cost import At, Cost


class NoisyTopK(Router):
    """Noisy top-k. ``floor`` is added to the noise's size (Tensor2Tensor has 1e-2)."""

    kind: Literal["noisy_topk"] = "noisy_topk"
    top_k: int = Field(ge=1)
    floor: float = Field(default=0.0, ge=0)
    estimates_load: ClassVar[bool] = True

    def build(self, width: int, experts: int) -> NoisyRouter:
        return NoisyRouter(self, width, experts)

    def cost(self, width: int, experts: int, at: At) -> Cost:
        """Two matrices; draws, their sizes and the chances are kept besides."""
        noise = Cost.of_matrix(width, experts, at, keep_input=False) + Cost(activation_bytes=28 * experts)
        return super().cost(width, experts, at) + noise


class NoisyRouter(RouterModule):
    """``weight`` (Wg) and ``noise`` (Wn) are [E, D]; logits and probabilities are those of ``h``."""

    starts_at_zero = True

    def __init__(self, spec: NoisyTopK, width: int, experts: int):
        super().__init__(width, experts)
        self.spec = spec
        self.noise = nn.Parameter(torch.empty(experts, width))

    def forward(self, x_TD: Tensor, chosen_TA: Tensor | None = None) -> Routing:
        clean_TE = self.logits(x_TD)
        size_TE = F.softplus(F.linear(x_TD.to(self.noise.dtype), self.noise)) + self.spec.floor
        logits_TE = clean_TE + torch.randn_like(clean_TE) * size_TE if self.training else clean_TE
        own_TA = best(logits_TE, self.spec.top_k)
        experts_TA = own_TA if chosen_TA is None else chosen_TA
        gates_TA = logits_TE.gather(1, experts_TA).softmax(-1)
        load_TE = self._chances(clean_TE, logits_TE, size_TE, own_TA)
        return Routing(logits_TE, logits_TE.softmax(-1), experts_TA, gates_TA, load_TE=load_TE)

    def _chances(self, clean_TE: Tensor, noisy_TE: Tensor, size_TE: Tensor, own_TA: Tensor) -> Tensor:
        """``P(x, i)``: to stay among the A best with this token's other draws as they are."""
        if self.spec.top_k == clean_TE.shape[1]:
            return torch.ones_like(clean_TE)
        is_in_TE = torch.zeros_like(clean_TE, dtype=torch.bool).scatter(1, own_TA, True)
        # Without itself, one that is in has the best of those out as its rival, one that is out the last of those in.
        first_out = noisy_TE.masked_fill(is_in_TE, -torch.inf).amax(-1, keepdim=True)
        rival_TE = torch.where(is_in_TE, first_out, noisy_TE.gather(1, own_TA[:, -1:]))
        return torch.special.ndtr((clean_TE - rival_TE) / size_TE.clamp_min(torch.finfo(size_TE.dtype).tiny))
