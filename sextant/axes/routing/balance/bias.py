"""Balance without a loss (2408.15664; DeepSeek-V3, section 2.3): a bias moves the choice, and gradients stay clean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from sextant.axes.routing.balance.base import BalanceUpdate
from sextant.axes.routing.base import Router, Routing


class Bias(BalanceUpdate):
    """After each step, experts above the mean load are made less attractive and those below more.

    ``sign``: by ``rate`` whatever the distance, ``b += rate * sign(mean - count)``. ``proportional``: by ``rate`` times
    the distance over the mean, so that it does not depend on the batch. Counts are those of the whole step, all ranks.
    The mean of b drifts and is left alone: a constant changes nothing. ``rate`` sets the floor of the swing; runs of a
    few hundred steps want 0.005 to 0.01. After the share ``until`` of the steps, b is frozen (V3: 14.3 of 14.8).
    """

    kind: Literal["bias"] = "bias"
    rate: float = Field(default=1e-3, ge=0)
    rule: Literal["sign", "proportional"] = "sign"
    until: float = Field(default=1.0, ge=0, le=1)

    def clashes(self, router: Router, experts: int) -> Iterator[tuple[str, str]]:
        if not getattr(router, "bias", False):
            what = f"router {getattr(router, 'kind', '')} has no selection bias to move"
            yield what, "Set router.bias: true, or leave this term out"

    def tally(self, routing: Routing) -> Tensor:
        return routing.counts_E()

    def update(self, router: nn.Module, counts_E: Tensor, progress: float) -> None:
        if progress >= self.until:
            return
        below_E = counts_E.sum() - counts_E.numel() * counts_E  # E times the distance to the mean, in whole numbers
        step_E = below_E.sign() if self.rule == "sign" else below_E / counts_E.sum().clamp_min(1)
        router.get_buffer("bias.value_E").add_(self.rate * step_E)
