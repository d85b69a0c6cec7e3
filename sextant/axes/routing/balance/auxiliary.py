"""The auxiliary balance loss in GShard's form, over three scopes (MAI-Base-1, section 9).

``coef * E * sum_e f_e P_e`` with ``f_e`` the share of token copies that expert e received (a constant for the
gradient) and ``P_e`` its mean probability: equal to ``coef`` under perfect balance, for any A. The scope matters more
than the form: with a small group every sequence is pushed to use all experts, which fights specialisation.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sextant.axes.routing.base import Routing
from sextant.core.spec import Spec
from sextant.core.stream import Stream


class Auxiliary(Spec):
    """Balance loss.

    ``global_batch`` takes ``f`` from all micro-batches and ranks of the step so far (``counts_E`` of the caller), and
    ``P`` from this micro-batch; summed over micro-batches it tends to the loss of the whole batch.
    """

    kind: Literal["auxiliary"] = "auxiliary"
    coef: float = Field(default=1e-2, ge=0)
    scope: Literal["micro_batch", "sequence", "global_batch"] = "micro_batch"

    def loss(self, routing: Routing, stream: Stream, counts_E: Tensor, tokens: int) -> Tensor:
        """This micro-batch's part of the step's balance loss.

        Args:
            routing: the layer's decisions for T tokens.
            stream: sequence boundaries, for the scope ``sequence``.
            counts_E: copies per expert over the step so far, this micro-batch included.
            tokens: tokens of the whole step; the parts of all micro-batches add up.
        """
        probs_TE, experts = routing.probs_TE, routing.probs_TE.shape[1]
        if self.scope == "sequence":
            share_BE = self._per_sequence(routing, stream)
            weight_TE = share_BE.index_select(0, stream.sequence_T)
            return self.coef * experts * (weight_TE * probs_TE).sum() / tokens
        counts_E = counts_E if self.scope == "global_batch" else routing.counts_E()
        share_E = (counts_E / counts_E.sum().clamp_min(1)).to(probs_TE.dtype)
        return self.coef * experts * (share_E * probs_TE.sum(0)).sum() / tokens

    def _per_sequence(self, routing: Routing, stream: Stream) -> Tensor:
        """Share of each sequence's copies that each expert received, ``[B, E]``."""
        experts, sequences = routing.probs_TE.shape[1], stream.cu_seqlens.numel() - 1
        cell_N = (stream.sequence_T[:, None] * experts + routing.experts_TA).flatten()
        counts_BE = torch.bincount(cell_N, minlength=sequences * experts).view(sequences, experts)
        return counts_BE.to(routing.probs_TE.dtype) / counts_BE.sum(1, keepdim=True).clamp_min(1)
