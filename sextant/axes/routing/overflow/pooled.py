"""Pooled capacity: groups of devices lend each other the places that they do not need (MiniMax-01, section 5.3).

Each of G expert-parallel groups would give an expert C places. After one all-gather of counts, group g's copies queue
behind those of the groups before it (an exclusive prefix sum) for G·C places in all; a surplus goes to the replica of
the expert in a group with room. What is kept is the same on any number of devices: here groups only set the count.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from sextant.axes.routing.base import Routing
from sextant.axes.routing.overflow.admission import admitted, ranked, share
from sextant.axes.routing.overflow.limited import Limited
from sextant.core.stream import Stream


class Pooled(Limited):
    """``sum_g ceil(factor * N_g * A / E)`` places per expert for the tokens of all ``groups`` together, which are equal
    parts of the stream; served by position.
    """

    kind: Literal["pooled"] = "pooled"
    groups: int = Field(default=1, ge=1)

    def limit(self, routing: Routing, stream: Stream, factor: float) -> Routing:
        tokens, copies = routing.experts_TA.shape
        ends = torch.arange(self.groups + 1) * tokens // self.groups
        limit = share(factor, ends.diff(), copies, routing.probs_TE.shape[1], self.minimum).sum().item()
        return admitted(routing, routing.experts_TA, int(limit), ranked(routing, "position"))
