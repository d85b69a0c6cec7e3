"""A bias per expert that steers the choice and nothing else (2408.15664; DeepSeek-V3, section 2.3).

The choice goes by ``s + b``; gates and probabilities come from ``s``. So ``b`` gets no gradient: the balance term that
counts loads moves it after the optimiser's step. One constant added to all of ``b`` changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class SelectionBias(nn.Module):
    """``value_E`` starts at 0 and is a buffer: saved with the model, unknown to the optimiser.

    It stays fp32 when the model is lowered: trained values lie near 5, where a bf16 step is 0.03 and makes ties.
    """

    value_E: Tensor

    def __init__(self, experts: int):
        super().__init__()
        self.register_buffer("value_E", torch.zeros(experts))

    def forward(self, scores_TE: Tensor) -> Tensor:
        """What the choice goes by, outside the graph: ``[T, E]``."""
        return scores_TE.detach() + self.value_E

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SelectionBias:
        """Moves and widening casts reach the buffer; a cast below fp32 only moves it."""
        exact_E = self.value_E
        super()._apply(fn, recurse)
        if self.value_E.dtype.itemsize < 4:
            self.value_E = exact_E.to(self.value_E.device)
        return self
