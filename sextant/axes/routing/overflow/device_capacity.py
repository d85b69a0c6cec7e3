"""Capacity per device, lowest affinity dropped first, some sequences exempt (DeepSeek-V2 2405.04434, section 2.2.4)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from sextant.axes.routing.base import Routing
from sextant.axes.routing.overflow.admission import admitted, ranked, share
from sextant.axes.routing.overflow.limited import Limited
from sextant.core.stream import Stream


class DeviceCapacity(Limited):
    """``C = ceil(factor * N * A / devices)`` places for all experts of a device together.

    Every sequence is ``exempt`` with that probability: its copies come first and are never dropped, in any layer.
    """

    kind: Literal["device_capacity"] = "device_capacity"
    factor: float = Field(default=1.0, gt=0)
    devices: int = Field(default=8, ge=1)
    exempt: float = Field(default=0.1, ge=0, le=1)

    def fits(self, experts: int) -> None:
        if experts % self.devices:
            raise ValueError(f"overflow.devices {self.devices} do not divide experts {experts}")

    def limit(self, routing: Routing, stream: Stream, factor: float) -> Routing:
        (tokens, copies), experts = routing.experts_TA.shape, routing.probs_TE.shape[1]
        exempt_T = (stream.lot_B < self.exempt)[stream.sequence_T]
        order_N = ranked(routing, "affinity")
        order_N = order_N[(~exempt_T[order_N // copies]).long().argsort(stable=True)]
        limit = share(factor, torch.tensor(tokens), copies, self.devices, self.minimum).item()
        limit_T = torch.full_like(stream.positions_T, int(limit)).masked_fill(exempt_T, tokens * copies)
        return admitted(routing, routing.experts_TA // (experts // self.devices), limit_T[:, None], order_N)
