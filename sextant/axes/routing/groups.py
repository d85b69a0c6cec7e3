"""A limit on how many groups of experts a token reaches: experts of one group share a device or a node.

DeepSeek-V2 keeps the 3 of 8 devices with the largest single affinity; DeepSeek-V3 the 4 of 8 nodes with the largest sum
of the two best (DeepSeek-V3, section 2.2). Experts of other groups are masked with -inf, not with 0: beside negative
scores a masked 0 would win.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sextant.axes.routing.base import best
from sextant.core.spec import Spec


class Groups(Spec):
    """``count`` groups of neighbours, of which a token keeps the ``kept`` best by their best or two best experts."""

    count: int = Field(ge=1)
    kept: int = Field(ge=1)
    score: Literal["max", "top2"] = "max"

    @model_validator(mode="after")
    def _has_enough(self) -> Groups:
        if self.kept > self.count:
            raise ValueError(f"kept {self.kept} exceeds count {self.count}")
        return self

    def fits(self, experts: int, top_k: int) -> None:
        """Raises ValueError when the groups are unequal or too small."""
        size, rest = divmod(experts, self.count)
        if rest:
            raise ValueError(f"router.groups.count {self.count} does not divide experts {experts}")
        if self.score == "top2" and size < 2:
            raise ValueError(f"router.groups.score top2 needs groups of 2, got {experts} experts in {self.count}")
        if self.kept * size < top_k:
            raise ValueError(f"router.top_k {top_k} exceeds the {self.kept * size} experts of the kept groups")

    def limit(self, scores_TE: Tensor) -> Tensor:
        """The scores, with -inf in the groups that are not kept; a tie goes to the lower group."""
        grouped = scores_TE.unflatten(1, (self.count, -1))  # [T, groups, experts of a group]
        worth = grouped.amax(-1) if self.score == "max" else grouped.topk(2).values.sum(-1)
        closed = torch.ones_like(worth, dtype=torch.bool).scatter(1, best(worth, self.kept), False)
        lowest = torch.finfo(scores_TE.dtype).min  # an open expert beats a closed one, even at -inf
        return grouped.clamp_min(lowest).masked_fill(closed[..., None], -torch.inf).flatten(1)
