"""Contract of axis 3: where do parameters live?

A feed-forward option builds a module ``x_TD (fp32), stream -> (y_TD, Routing or None)``; the stream says which tokens
lie in one sequence. One that routes also takes ``recorded``, the choices to follow where there is a record of them.
"""

from __future__ import annotations

from torch import nn

from sextant.axes.numerics import Numerics
from sextant.core.cost import At, Cost
from sextant.core.spec import Spec


class FeedForward(Spec):
    """Base of the capacity options."""

    def build(self, width: int, numerics: Numerics) -> nn.Module:
        raise NotImplementedError

    def cost(self, width: int, at: At) -> Cost:
        raise NotImplementedError
