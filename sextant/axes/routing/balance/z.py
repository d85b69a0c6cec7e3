"""Router z-loss (ST-MoE, 2202.08906): keeps logits small, so that rounding does not change the choice."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from sextant.axes.routing.balance.base import BalanceLoss
from sextant.axes.routing.base import Routing
from sextant.core.stream import Stream


class ZLoss(BalanceLoss):
    """``coef * mean_t logsumexp_e(z_te)^2``."""

    kind: Literal["z"] = "z"
    coef: float = Field(default=1e-3, ge=0)

    def loss(self, routing: Routing, stream: Stream, counts_E: Tensor | None, tokens: int) -> Tensor:
        return self.coef * routing.logits_TE.logsumexp(-1).square().sum() / tokens
