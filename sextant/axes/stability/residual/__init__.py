"""Where norms and scales stand around a sublayer, and what its branch starts with: one file per placement."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sextant.axes.stability.residual.base import Branch, Placement, Sublayer
from sextant.axes.stability.residual.deep import DeepNorm
from sextant.axes.stability.residual.layerscale import LayerScale
from sextant.axes.stability.residual.post import PostNorm
from sextant.axes.stability.residual.pre import PreNorm
from sextant.axes.stability.residual.rezero import ReZero
from sextant.axes.stability.residual.sandwich import SandwichNorm
from sextant.axes.stability.residual.skipinit import SkipInit

AnyResidual = Annotated[
    PreNorm | PostNorm | SandwichNorm | DeepNorm | ReZero | SkipInit | LayerScale, Field(discriminator="kind")
]

__all__ = [
    "AnyResidual", "Branch", "DeepNorm", "LayerScale", "Placement", "PostNorm", "PreNorm", "ReZero", "SandwichNorm",
    "SkipInit", "Sublayer",
]
