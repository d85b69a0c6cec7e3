"""Full causal attention: every query reads every key before it, and itself."""

from __future__ import annotations

from typing import Literal

from sextant.axes.attention.static import SpanPattern
from sextant.kernels.attention import Span


class Full(SpanPattern):
    """All earlier keys. FLOPs grow with T per token, state with T."""

    kind: Literal["full"] = "full"

    @property
    def span(self) -> Span:
        return Span()
