"""Contract of axis 4: who goes where, what happens when an expert is full, and what keeps the load even?

A router turns rows into a :class:`Routing`, in fp32. Everything that balance needs is in that record, which leaves the
model's forward as data: recomputation cannot count twice, and a caller can keep it, report it or feed it back.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sextant.core.cost import At, Cost
from sextant.core.spec import Spec
from sextant.kernels.permute import counted


@dataclass(frozen=True)
class Routing:
    """What one MoE layer decided for T tokens.

    Attributes:
        logits_TE: fp32 router scores before normalisation.
        probs_TE: fp32 probabilities (differentiable).
        experts_TA: int64, chosen experts of each token, best first.
        gates_TA: fp32 weights of the chosen experts (differentiable).
    """

    logits_TE: Tensor
    probs_TE: Tensor
    experts_TA: Tensor
    gates_TA: Tensor

    def counts_E(self) -> Tensor:
        """int64, token copies per expert; they sum to T·A."""
        return counted(self.experts_TA.flatten(), self.probs_TE.shape[1])


class Router(Spec):
    """Base of the routers. ``build(width, experts)`` gives a module ``x_TD -> Routing``."""

    top_k: int

    def cost(self, width: int, experts: int, at: At) -> Cost:
        """One fp32 matrix, and the logits and probabilities it leaves."""
        return Cost.of_matrix(width, experts, at, keep_input=False) + Cost(activation_bytes=8 * experts)
