"""Dilated sliding window: the last ``window`` keys, ``dilation`` tokens apart (Longformer, 2004.05150 section 3.1).

The tokens of one residue class modulo the dilation never read another class, so they are computed as sequences of their
own under a plain window.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from sextant.axes.attention.static import SpanPattern
from sextant.axes.kv.base import KV
from sextant.kernels.attention import Span


class Dilated(SpanPattern):
    """``window`` keys, ``dilation`` apart: reaches ``(window - 1) * dilation`` tokens back at the cost of ``window``.

    A decoding state keeps the gaps too, because the next tokens read them.
    """

    kind: Literal["dilated"] = "dilated"
    window: int = Field(ge=1)
    dilation: int = Field(default=2, ge=1)

    @property
    def span(self) -> Span:
        return Span(self.window, dilation=self.dilation)

    def clashes(self, kv: KV, context: int) -> Iterator[tuple[str, str, str]]:
        far = (self.window - 1) * self.dilation + 1
        if far > context:
            what = f"{self.window} keys at distance {self.dilation} take {far} tokens, and the context has {context}"
            yield "attention.window", what, "Use a smaller window or dilation, or a longer context"
