"""Balance among what devices receive (DeepSeek-V2 2405.04434, section 2.2.3).

A token that meets several experts of one device travels there once, so this differs from the device's load.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sextant.axes.routing.balance.device import DeviceShare
from sextant.axes.routing.base import Router, Routing


class Communication(DeviceShare):
    """``coef * sum_d f''_d P'_d`` with ``f''_d = D / (M T)`` times the tokens sent to device d.

    ``limit`` is M, the most devices that the router lets a token visit.
    """

    kind: Literal["communication"] = "communication"
    coef: float = Field(default=0.02, ge=0)
    limit: int = Field(ge=1)

    def clashes(self, router: Router, experts: int) -> Iterator[tuple[str, str]]:
        yield from super().clashes(router, experts)
        if self.limit > self.devices:
            yield f"limit {self.limit} exceeds devices {self.devices}", "Use the most devices that a token visits"

    def sent_TE(self, routing: Routing) -> Tensor:
        """One more column counts the tokens themselves."""
        visits_TE = super().sent_TE(routing).clamp_max(1)
        return torch.cat([visits_TE, torch.ones_like(visits_TE[:, :1])], dim=1)

    def share(self, sent: Tensor) -> Tensor:
        visits, tokens = sent[..., :-1], sent[..., -1:]
        return visits / (self.limit * tokens).clamp_min(1)
