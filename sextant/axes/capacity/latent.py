"""LatentMoE: tokens are compressed once before dispatch, experts live in the latent, one shared matrix leads back.

MAI-Base-1 section 7; 2601.18089. All-to-all bytes and expert weights fall by D / l; the router still reads the
uncompressed row, so routing does not depend on the compression.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from sextant.axes.capacity.experts import Experts, ExpertsModule
from sextant.axes.numerics import Numerics
from sextant.axes.routing import Routing, Usage
from sextant.axes.stability import Linear, Role
from sextant.core.cost import At, Cost


class LatentExperts(Experts):
    """Experts on ``latent`` channels between a shared down- and up-projection."""

    kind: Literal["latent_experts"] = "latent_experts"  # type: ignore[assignment]
    latent: int = Field(ge=1)

    def build(self, width: int, numerics: Numerics) -> LatentExpertsModule:
        return LatentExpertsModule(self, width, numerics)

    def cost(self, width: int, at: At) -> Cost:
        around = Cost.of_matrix(width, self.latent, at) + Cost.of_matrix(self.latent, width, at)
        routed = self.router.cost(width, self.experts, at) + self.expert_cost(self.latent, at)
        return around + routed + self.shared_cost(width, at)


class LatentExpertsModule(ExpertsModule):
    """``[T, D] -> [T, D]`` through ``[T, l]``."""

    spec: LatentExperts

    def __init__(self, spec: LatentExperts, width: int, numerics: Numerics):
        super().__init__(spec, width, numerics)
        self.compress = Linear(width, spec.latent, Role.FF_IN)
        self.expand = Linear(spec.latent, width, Role.FF_OUT)

    def _payload(self, width: int) -> int:
        return self.spec.latent

    def routed(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Usage]:
        s_TD, usage = super().routed(self.compress(x_TD), routing)
        return self.expand(self.numerics.lower(s_TD)), usage
