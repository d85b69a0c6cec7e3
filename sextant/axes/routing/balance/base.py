"""Contract of a balance term: a loss on a layer's routing, or a change made to its router after the step.

A term may ask for a sum over the whole step (:meth:`BalanceTerm.tally`). Such sums live with the caller
(``train/balance.py``), never in forward: recomputation cannot add to them, accumulation and ranks do.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from sextant.axes.routing.base import Router, Routing
from sextant.core.spec import Spec
from sextant.core.stream import Stream


class BalanceTerm(Spec):
    """Base of the balance terms."""

    def clashes(self, router: Router, experts: int) -> Iterator[tuple[str, str]]:
        """Why this term cannot work with this router or so many experts: reason and remedy of each problem."""
        yield from ()

    def tally(self, routing: Routing) -> Tensor | None:
        """What is to be summed over micro-batches and ranks; None when the term looks at one micro-batch alone."""
        return None


class BalanceLoss(BalanceTerm):
    """Base of the terms that add to the loss."""

    @property
    def ahead(self) -> bool:
        """Whether :meth:`loss` needs the sum over the whole step before the first backward."""
        return False

    def loss(self, routing: Routing, stream: Stream, counts_E: Tensor | None, tokens: int) -> Tensor:
        """This micro-batch's part of the step's loss; the parts of all micro-batches and ranks add up.

        Args:
            routing: the layer's decisions for T tokens.
            stream: sequence boundaries, for the scope ``sequence``.
            counts_E: the sum of :meth:`tally` over the step, where the term asks for one.
            tokens: tokens of the whole step.
        """
        raise NotImplementedError


class BalanceUpdate(BalanceTerm):
    """Base of the terms that change the router between steps."""

    def update(self, router: nn.Module, counts_E: Tensor, progress: float) -> None:
        """Change the router from the step's sum of :meth:`tally`, when the share ``progress`` of the run is done."""
        raise NotImplementedError
