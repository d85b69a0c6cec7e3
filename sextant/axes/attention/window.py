"""Sliding window, with optional attention sinks.

Token t reads keys s with ``0 <= t - s < window``, so ``window`` keys with its own, plus the first ``sinks`` tokens of
its sequence (2309.17453), which a trained model uses as a resting place for weight.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sextant.axes.attention.static import SpanPattern
from sextant.kernels.attention import Span


class Window(SpanPattern):
    """The last ``window`` keys and the first ``sinks``. FLOPs and state stop growing at that length."""

    kind: Literal["window"] = "window"
    window: int = Field(ge=1)
    sinks: int = Field(default=0, ge=0)

    @property
    def span(self) -> Span:
        return Span(self.window, self.sinks)
