"""One layer as a declaration: a choice on each of the axes 1, 2, 3 (with 4) and 5."""

from __future__ import annotations

from pydantic import model_validator

from sextant.axes.attention import AnyAttention, Full, Mixer, Pattern
from sextant.axes.capacity import AnyFeedForward
from sextant.axes.kv import KV, AnyKV
from sextant.axes.stability import AnyResidual, PreNorm
from sextant.core.cost import At, Cost
from sextant.core.errors import UsageError
from sextant.core.spec import Spec
from sextant.core.state import StateSpec


class Layer(Spec):
    """One choice on each of the axes 1, 2, 3 (with 4) and 5; a linear mixer projects itself, without ``kv``."""

    attention: AnyAttention = Full()
    kv: AnyKV | None = None
    feed_forward: AnyFeedForward
    residual: AnyResidual = PreNorm()

    @model_validator(mode="after")
    def _projected_once(self) -> Layer:
        if isinstance(self.attention, Mixer) and self.kv is not None:
            raise ValueError(f"attention {self.attention.kind} has projections of its own: leave kv out")
        if isinstance(self.attention, Pattern) and self.kv is None:
            raise ValueError(f"attention {self.attention.kind} needs kv, such as kind: gqa")
        return self

    @property
    def projections(self) -> KV:
        """The KV option of a layer that attends.

        Raises:
            UsageError: asked of a linear mixer.
        """
        if self.kv is None:
            raise UsageError(f"attention {self.attention.kind} has no kv option")
        return self.kv

    def state(self) -> StateSpec:
        """What this layer remembers while decoding."""
        if isinstance(self.attention, Pattern):
            return self.attention.state(self.projections)
        return self.attention.state()

    def attention_cost(self, width: int, at: At) -> Cost:
        """Projections, scores and state."""
        if isinstance(self.attention, Pattern):
            kv = self.projections
            return kv.cost(width, at) + self.attention.cost(width, kv, at)
        return self.attention.cost(width, at)

    def cost(self, width: int, at: At) -> Cost:
        """Of one layer, norms included."""
        attention = self.attention_cost(width, at)
        return attention + self.feed_forward.cost(width, at) + self.residual.cost(width, at)
