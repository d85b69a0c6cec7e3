"""Dropless: every expert takes all that is sent to it (MegaBlocks, 2211.15841; MAI-Base-1, section 8).

The default, because dropping changes what an ablation measures and lets later tokens decide about earlier ones.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sextant.axes.routing.base import Routing
from sextant.core.spec import Spec


class Dropless(Spec):
    """No limit per expert; imbalance costs time, not tokens."""

    kind: Literal["dropless"] = "dropless"

    def admit(self, routing: Routing) -> Tensor:
        """Gates after the capacity rule: here, all of them."""
        return routing.gates_TA
