"""The form most balance losses have: share of what was sent, times mean probability.

``coef * E * sum_e f_e P_e``, where E counts slots (experts, or groups of them), ``f_e`` is the share that slot e
received (whole numbers, so a constant for the gradient) and ``P_e`` its mean probability. Perfect balance gives
``coef``, whatever A is. The gradient is that of ``sum_e f_e P_e`` in P alone: linear, so micro-batches and ranks add up
exactly once they agree on f.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sextant.axes.routing.balance.base import BalanceLoss
from sextant.axes.routing.base import Routing
from sextant.core.stream import Stream

Scope = Literal["micro_batch", "sequence", "global_batch", "running"]


class ShareLoss(BalanceLoss):
    """Base of these losses; ``scope`` says which tokens ``f`` is taken from (MAI-Base-1, section 9.1).

    * ``micro_batch``: those of one forward.
    * ``sequence``: those of each sequence, which pushes every sequence to use all experts and fights specialisation.
    * ``global_batch``: all of the step, micro-batches and ranks. Exact: with accumulation, a first pass only counts.
    * ``running``: those of the step seen so far. One pass, and an approximation unless there is one micro-batch.

    The scope matters more than the form of the loss.
    """

    coef: float = Field(default=1e-2, ge=0)
    scope: Scope = "micro_batch"

    @property
    def ahead(self) -> bool:
        return self.scope == "global_batch"

    def sent_TE(self, routing: Routing) -> Tensor:
        """int32, copies of each token that count for each slot."""
        raise NotImplementedError

    def probs_TE(self, routing: Routing) -> Tensor:
        """Probability of each slot, with gradient."""
        return routing.probs_TE

    def share(self, sent: Tensor) -> Tensor:
        """``f`` from sums of :meth:`sent_TE` over some tokens; sums to one. Last axis: slots."""
        return sent / sent.sum(-1, keepdim=True).clamp_min(1)

    def tally(self, routing: Routing) -> Tensor | None:
        return self.sent_TE(routing).sum(0) if self.scope in ("global_batch", "running") else None

    def loss(self, routing: Routing, stream: Stream, counts_E: Tensor | None, tokens: int) -> Tensor:
        probs_TE = self.probs_TE(routing)
        if self.scope == "sequence":
            sent_TE = self.sent_TE(routing)
            sent_BE = sent_TE.new_zeros(stream.cu_seqlens.numel() - 1, sent_TE.shape[1])
            share_BE = self.share(sent_BE.index_add_(0, stream.sequence_T, sent_TE)).to(probs_TE.dtype)
            total = (share_BE.index_select(0, stream.sequence_T) * probs_TE).sum()
        else:
            share_E = self.share(self.sent_TE(routing).sum(0) if counts_E is None else counts_E)
            total = (share_E.to(probs_TE.dtype) * probs_TE.sum(0)).sum()
        return self.coef * probs_TE.shape[1] * total / tokens


def marks_TE(experts_TA: Tensor, sent_TA: Tensor | None, experts: int) -> Tensor:
    """int32 ``[T, E]``: 1 at the experts named, where something is sent to them."""
    sent_TA = torch.ones_like(experts_TA) if sent_TA is None else sent_TA
    return experts_TA.new_zeros(len(experts_TA), experts).int().scatter_(1, experts_TA, sent_TA.int())
