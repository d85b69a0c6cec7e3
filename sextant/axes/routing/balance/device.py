"""Balance among the devices that hold the experts (DeepSeekMoE 2401.06066; DeepSeek-V2 2405.04434, section 2.2.3)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field
from torch import Tensor

from sextant.axes.routing.balance.share import ShareLoss, marks_TE
from sextant.axes.routing.base import Router, Routing


class DeviceShare(ShareLoss):
    """Base of losses over ``devices`` groups of neighbouring experts: probabilities are sums over a group."""

    devices: int = Field(ge=1)

    def clashes(self, router: Router, experts: int) -> Iterator[tuple[str, str]]:
        if experts % self.devices:
            yield f"{experts} experts do not spread evenly over {self.devices} devices", f"Use a divisor of {experts}"

    def sent_TE(self, routing: Routing) -> Tensor:
        return self._grouped(marks_TE(routing.experts_TA, routing.sent_TA, routing.probs_TE.shape[1]))

    def probs_TE(self, routing: Routing) -> Tensor:
        return self._grouped(routing.probs_TE)

    def _grouped(self, x_TE: Tensor) -> Tensor:
        return x_TE.unflatten(1, (self.devices, -1)).sum(-1, dtype=x_TE.dtype)


class Device(DeviceShare):
    """``coef * sum_d f'_d P'_d``: the loss over experts with groups in their place.

    ``f'`` is the mean over the group of ``E / (A T) * copies``, ``P'`` the sum of its probabilities.
    """

    kind: Literal["device"] = "device"
    coef: float = Field(default=0.05, ge=0)
