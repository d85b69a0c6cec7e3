"""Contract of axis 2: what is projected, cached and shared?

A KV option builds a module with ``project(x_TD, stream) -> q_THK, k_TGK, v_TGV`` (position code applied),
``output(o_THV) -> y_TD`` and ``scores`` (how a score is made), and says how wide a cached row is.
"""

from __future__ import annotations

from torch import nn

from sextant.axes.numerics import Numerics
from sextant.core.cost import At, Cost
from sextant.core.spec import Spec


class KV(Spec):
    """Base of the KV options."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Query heads H, cached heads G, and the widths K and V of one cached row."""
        raise NotImplementedError

    def build(self, width: int, numerics: Numerics) -> nn.Module:
        raise NotImplementedError

    def cost(self, width: int, at: At) -> Cost:
        """The projections; scores and state belong to the pattern."""
        raise NotImplementedError
