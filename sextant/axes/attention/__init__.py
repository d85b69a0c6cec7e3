"""Axis 1, attention: which keys does a query read?"""

from typing import Annotated

from pydantic import Field

from sextant.axes.attention.base import Pattern
from sextant.axes.attention.full import Full
from sextant.axes.attention.window import Window
from sextant.core.table import Row, Table

AnyPattern = Annotated[Full | Window, Field(discriminator="kind")]

TABLE = Table(
    "attention",
    "which keys does a query read?",
    (
        Row(Full, "every earlier key", "1706.03762", (Full(),)),
        Row(
            Window,
            "the last W keys, and the first few as sinks",
            "2004.05150; 2310.06825; sinks 2309.17453",
            (Window(window=4), Window(window=1), Window(window=3, sinks=2), Window(window=64)),
        ),
    ),
)

__all__ = ["TABLE", "AnyPattern", "Full", "Pattern", "Window"]
