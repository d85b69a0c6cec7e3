"""What makes one compressed row of a window of rows: NSA's learned phi, or the mean (2502.11089, section 3.3.1)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sextant.axes.stability import Role
from sextant.core.cost import At, Cost
from sextant.core.spec import Spec
from sextant.kernels import matmul


class MLPPhi(Spec):
    """Per KV head: ``silu((window + place) U) D`` over the flattened window; ``place`` is learned for every token of
    the window. The paper prints an MLP with intra-block positions; its width and activation are ours.
    """

    kind: Literal["mlp"] = "mlp"
    hidden: int = Field(ge=1)

    def build(self, groups: int, length: int, dim: int) -> nn.Module:
        return MLP(groups, length, dim, self.hidden)

    def cost(self, groups: int, length: int, dim: int, rate: float, at: At) -> Cost:
        """At ``rate`` windows per token."""
        weights = groups * (length * dim * self.hidden + self.hidden * dim)
        params = weights + groups * length * dim
        kept = at.itemsize * groups * (length * dim + 2 * self.hidden) * rate
        return Cost(params, params, 2.0 * weights * rate, activation_bytes=kept)


class MeanPhi(Spec):
    """The mean of the window: no parameters, and turned keys stay turned (fla's layer)."""

    kind: Literal["mean"] = "mean"

    def build(self, groups: int, length: int, dim: int) -> nn.Module:
        return Mean()

    def cost(self, groups: int, length: int, dim: int, rate: float, at: At) -> Cost:
        return Cost()


AnyPhi = Annotated[MLPPhi | MeanPhi, Field(discriminator="kind")]


class MLP(nn.Module):
    """Windows ``[M, W, G, K] -> [M, G, K]``, with weights of its own for every KV head."""

    roles = {"place_WGK": Role.ATTENTION_IN, "up_GDF": Role.ATTENTION_IN, "down_GFK": Role.ATTENTION_IN}

    def __init__(self, groups: int, length: int, dim: int, hidden: int):
        super().__init__()
        self.place_WGK = nn.Parameter(torch.empty(length, groups, dim))
        self.up_GDF = nn.Parameter(torch.empty(groups, length * dim, hidden))
        self.down_GFK = nn.Parameter(torch.empty(groups, hidden, dim))

    def forward(self, x_MWGK: Tensor) -> Tensor:
        x_MWGK = x_MWGK + self.place_WGK.to(x_MWGK.dtype)
        flat_GMD = x_MWGK.transpose(1, 2).flatten(2).transpose(0, 1)
        hidden_GMF = F.silu(matmul.mm(flat_GMD, self.up_GDF.to(x_MWGK.dtype)))
        return matmul.mm(hidden_GMF, self.down_GFK.to(x_MWGK.dtype)).transpose(0, 1)


class Mean(nn.Module):
    """Windows ``[M, W, G, K] -> [M, G, K]``, summed in fp32."""

    def forward(self, x_MWGK: Tensor) -> Tensor:
        return x_MWGK.mean(1, dtype=torch.promote_types(x_MWGK.dtype, torch.float32)).to(x_MWGK.dtype)
