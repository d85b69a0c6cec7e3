"""Capacity: every expert has so many places per group of tokens, what comes too late is dropped (GShard 2006.16668,
Switch 2101.03961, V-MoE 2106.05974, DeepSpeed-MoE 2201.05596).
"""

from __future__ import annotations

from typing import Literal

import torch

from sextant.axes.routing.base import Routing
from sextant.axes.routing.overflow.admission import Order, admitted, ranked, share
from sextant.axes.routing.overflow.limited import Limited
from sextant.core.stream import Stream


class Capacity(Limited):
    """``C = ceil(factor * N * A / E)`` places per expert in each group of N tokens; ``order`` says who comes first.

    A group is a sequence, or all ``tokens`` of the micro-batch, where batch mates take places from each other.
    """

    kind: Literal["capacity"] = "capacity"
    order: Order = "choice"
    group: Literal["sequence", "tokens"] = "tokens"

    def limit(self, routing: Routing, stream: Stream, factor: float) -> Routing:
        (tokens, copies), experts = routing.experts_TA.shape, routing.probs_TE.shape[1]
        if self.group == "sequence":
            sizes_B, group_T = stream.cu_seqlens.diff(), stream.sequence_T
        else:
            group_T = torch.zeros(tokens, dtype=torch.int64, device=stream.positions_T.device)
            sizes_B = torch.full_like(group_T[:1], tokens)
        limit_T = share(factor, sizes_B, copies, experts, self.minimum)[group_T]
        bins_TA = group_T[:, None] * experts + routing.experts_TA
        return admitted(routing, bins_TA, limit_T[:, None], ranked(routing, self.order))
