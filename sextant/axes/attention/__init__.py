"""Axis 1, attention: which keys does a query read?"""

from typing import Annotated

from pydantic import Field

from sextant.axes.attention.base import Mixer, Pattern, Selection
from sextant.axes.attention.full import Full
from sextant.axes.attention.moba import MoBA
from sextant.axes.attention.nsa import NSA, MeanPhi, MLPPhi
from sextant.axes.attention.window import Window
from sextant.core.table import Row, Table

AnyAttention = Annotated[Full | Window | MoBA | NSA, Field(discriminator="kind")]

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
        Row(
            NSA,
            "compressed keys, the blocks that they point to, and a window, gated",
            "2502.11089",
            (
                NSA(length=4, stride=2, block=4, top_k=3, initial=1, local=1, window=3, phi=MLPPhi(hidden=5)),
                NSA(
                    length=2, stride=2, block=2, top_k=4, initial=1, local=2, window=2, phi=MeanPhi(), gates="token",
                    separate_kv=False, cmp_rope="post",
                ),
                NSA(
                    length=4, stride=2, block=4, top_k=2, initial=0, local=2, window=5, phi=MLPPhi(hidden=4),
                    separate_kv=False, cmp_rope="none",
                ),
                NSA(length=2, stride=1, block=3, top_k=3, local=1, window=2, phi=MeanPhi(), cmp_rope="post"),
            ),
        ),
    ),
)

__all__ = ["NSA", "TABLE", "AnyAttention", "Full", "Mixer", "MoBA", "Pattern", "Selection", "Window"]
