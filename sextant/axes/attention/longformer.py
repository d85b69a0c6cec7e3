"""Longformer's pattern (2004.05150), causal: a window, with gaps in some heads, and the first tokens as global ones.

In a causal model a global token reads what every token of its place reads, and all later ones read it: the globals are
the first ``global_tokens`` of a sequence. The published encoder's own projections for global queries would serve those
few tokens alone and are left out. :func:`encoder_mask` is the published two-sided pattern.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sextant.axes.attention.static import StaticPattern, fading
from sextant.axes.kv.base import KV
from sextant.kernels.attention import Reach, Span


class Longformer(StaticPattern):
    """The last ``window`` keys and the first ``global_tokens``.

    Attributes:
        dilation: distance between the keys of the window in the dilated KV groups.
        dilated: how many KV groups, the last ones, are dilated.
    """

    kind: Literal["longformer"] = "longformer"
    window: int = Field(ge=1)
    global_tokens: int = Field(default=0, ge=0)
    dilation: int = Field(default=1, ge=1)
    dilated: int = Field(default=0, ge=0)

    def reaches(self, kv: KV) -> tuple[Reach, ...]:
        near = Span(self.window, self.global_tokens)
        far = Span(self.window, self.global_tokens, self.dilation)
        return (near,) * (kv.shape[1] - self.dilated) + (far,) * self.dilated

    def clashes(self, kv: KV, context: int) -> Iterator[tuple[str, str, str]]:
        yield from fading(kv, "global_tokens", self.global_tokens)
        if self.dilated > kv.shape[1]:
            what = f"{self.dilated} groups are dilated, and there are {kv.shape[1]} KV heads"
            yield "attention.dilated", what, "Dilate fewer, or use more KV heads"
        far = (self.window - 1) * (self.dilation if self.dilated else 1) + 1
        if far > context:
            what = f"the window reaches over {far} tokens, and the context has {context}"
            yield "attention.window", what, "Use a smaller window or dilation, or a longer context"


def encoder_mask(global_T: Tensor, side: int, dilation: int = 1) -> Tensor:
    """bool ``[T, S]`` of the published encoder: ``side`` keys on each side, global tokens read and are read by all.

    Args:
        global_T: bool, which tokens are global.
    """
    place_T = torch.arange(len(global_T), device=global_T.device)
    distance_TS = (place_T[:, None] - place_T).abs()
    near_TS = (distance_TS <= side * dilation) & (distance_TS % dilation == 0)
    return near_TS | global_T[:, None] | global_T
