"""What routers share that score all experts and take the best: steering by a bias, a limit on groups, gates."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from sextant.axes.routing.base import Router, RouterModule, best
from sextant.axes.routing.bias import SelectionBias
from sextant.axes.routing.groups import Groups


class TopK(Router):
    """The ``top_k`` best by score, plus a ``bias`` if wanted, inside the kept ``groups``; gates times ``scale``."""

    top_k: int = Field(ge=1)
    normalize: bool = False
    scale: float = Field(default=1.0, gt=0)
    bias: bool = False
    groups: Groups | None = None

    def fits(self, experts: int) -> None:
        super().fits(experts)
        if self.groups is not None:
            self.groups.fits(experts, self.top_k)


class TopKRouter(RouterModule):
    """``bias`` and groups touch the choice alone; gates come from the scores."""

    def __init__(self, spec: TopK, width: int, experts: int):
        super().__init__(width, experts)
        self.spec = spec
        self.bias = SelectionBias(experts) if spec.bias else None

    def choose(self, scores_TE: Tensor) -> Tensor:
        """int64 ``[T, A]``, best first by the scores themselves: a bias changes the set, not the order in it."""
        biased_TE = scores_TE.detach() if self.bias is None else self.bias(scores_TE)
        open_TE = biased_TE if self.spec.groups is None else self.spec.groups.limit(biased_TE)
        chosen_TA = best(open_TE, self.spec.top_k)
        if self.bias is None:
            return chosen_TA
        chosen_TA = chosen_TA.sort(dim=-1).values
        return chosen_TA.gather(1, best(scores_TE.gather(1, chosen_TA), self.spec.top_k))


def jittered(x_TD: Tensor, eps: float) -> Tensor:
    """Rows times uniform(1 - eps, 1 + eps), element by element, from torch's own generator (2101.03961)."""
    return x_TD * torch.empty_like(x_TD).uniform_(1 - eps, 1 + eps)
