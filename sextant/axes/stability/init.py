"""How parameters start: one table, role -> standard deviation, for each scheme; gains and biases are set, not drawn."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from sextant.axes.stability.linear import Role, roles
from sextant.axes.stability.residual import SandwichBranch
from sextant.core.spec import Spec


class NormalInit(Spec):
    """Every matrix N(0, std^2) (MAI-Base-1, Mixtral, Gemma)."""

    kind: Literal["normal"] = "normal"
    std: float = Field(default=0.02, gt=0)

    def stds(self, layers: int) -> dict[Role, float]:
        """Standard deviation by role."""
        return dict.fromkeys(_MATRICES, self.std)


class DepthScaledInit(Spec):
    """N(0, std^2), and std / sqrt(2 L) for the matrices that write to the residual stream (GPT-2)."""

    kind: Literal["depth_scaled"] = "depth_scaled"
    std: float = Field(default=0.02, gt=0)

    def stds(self, layers: int) -> dict[Role, float]:
        """Standard deviation by role."""
        writes = self.std / math.sqrt(2 * layers)
        return {**dict.fromkeys(_MATRICES, self.std), Role.ATTENTION_OUT: writes, Role.FF_OUT: writes}


AnyInit = Annotated[NormalInit | DepthScaledInit, Field(discriminator="kind")]

_MATRICES = [role for role in Role if role not in (Role.GAIN, Role.BIAS)]


@torch.no_grad()
def initialise(model: nn.Module, init: NormalInit | DepthScaledInit, layers: int, generator: torch.Generator) -> None:
    """Fill every parameter of a built model, in the order of its names."""
    stds = init.stds(layers)
    by_role = roles(model)
    for name, parameter in model.named_parameters():
        if (role := by_role[name]) in stds:
            parameter.normal_(0.0, stds[role], generator=generator)
        elif role is Role.BIAS:
            parameter.zero_()
    for module in model.modules():
        if hasattr(module, "fill"):
            module.fill(1.0)  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, SandwichBranch):
            module.norm_out.fill(module.gain)
