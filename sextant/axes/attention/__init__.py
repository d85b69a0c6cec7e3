"""Axis 1, attention: which keys does a query read?"""

from typing import Annotated

from pydantic import Field

from sextant.axes.attention.base import Mixer, Pattern, Selection
from sextant.axes.attention.full import Full
from sextant.axes.attention.moba import MoBA
from sextant.axes.attention.window import Window
from sextant.core.table import Row, Table

AnyAttention = Annotated[Full | Window | MoBA, Field(discriminator="kind")]

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
        Row(
            MoBA,
            "the current block and the past blocks with the likeliest mean key",
            "2502.13189",
            (
                MoBA(block=3, top_k=2),
                MoBA(block=2, top_k=3, per="group"),
                MoBA(block=4, top_k=1),
                MoBA(block=2, top_k=3, previous=1, min_len=7, key_conv=3),
                MoBA(block=512, top_k=2, decode="dense"),  # so long that dense and sparse decoding agree
            ),
        ),
    ),
)

__all__ = ["TABLE", "AnyAttention", "Full", "Mixer", "MoBA", "Pattern", "Selection", "Window"]
