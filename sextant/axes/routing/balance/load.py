"""Load loss (Shazeer 2017, 1701.06538, equations 8 to 11): experts should get equally many tokens.

Equal sums of gates may still hide a few large ones against many small ones. Counts have no gradient, so the noisy
router offers a smooth estimate: the chance that a token is sent, over fresh noise on one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Tensor

from sextant.axes.routing.balance.spread import SpreadLoss
from sextant.axes.routing.base import Router, Routing
from sextant.core.errors import UsageError

REMEDY = "Use a router with noise (noisy_topk), or balance kind: auxiliary"


class SmoothLoad(SpreadLoss):
    """``coef * CV^2`` of ``sum_t load_te``."""

    kind: Literal["load"] = "load"

    def clashes(self, router: Router, experts: int) -> Iterator[tuple[str, str]]:
        if not router.estimates_load:
            yield f"router {getattr(router, 'kind', '')} gives no smooth estimate of its load", REMEDY

    def sum_E(self, routing: Routing) -> Tensor:
        """
        Raises:
            UsageError: the router gives no estimate.
        """
        if routing.load_TE is None:
            raise UsageError("balance kind: load needs a router that estimates its load", fix=REMEDY)
        return routing.load_TE.sum(0)
