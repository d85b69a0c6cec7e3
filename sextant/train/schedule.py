"""Learning-rate schedules: a factor on the peak rate as a function of the step. All warm up linearly from 0."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sextant.core.spec import Spec


class _Schedule(Spec):
    warmup: int = Field(default=0, ge=0, description="steps of linear warm-up")
    final: float = Field(default=0.1, ge=0, le=1, description="share of the peak rate at the end")

    def factor(self, step: int, steps: int) -> float:
        """Factor for optimiser step ``step`` (from 0) of ``steps``."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return self.after(step - self.warmup, max(1, steps - self.warmup))

    def after(self, step: int, steps: int) -> float:
        """Factor once warm, ``step`` of ``steps`` since then."""
        raise NotImplementedError


class Cosine(_Schedule):
    """Half a cosine from the peak to ``final``."""

    kind: Literal["cosine"] = "cosine"

    def after(self, step: int, steps: int) -> float:
        done = min(1.0, step / steps)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))


class WSD(_Schedule):
    """The peak until the last ``decay`` of the steps after warm-up, then linear to ``final``."""

    kind: Literal["wsd"] = "wsd"
    decay: float = Field(default=0.2, gt=0, le=1)

    def after(self, step: int, steps: int) -> float:
        left = (steps - step) / (self.decay * steps)
        return self.final + (1 - self.final) * min(1.0, max(0.0, left))


class Steps(_Schedule):
    """The peak times one more ``factor_each`` at shares ``at`` of the steps after warm-up, never below ``final``."""

    kind: Literal["steps"] = "steps"
    at: tuple[float, ...] = (0.8, 0.9)
    factor_each: float = Field(default=0.316, gt=0, le=1)

    @model_validator(mode="after")
    def _ascending(self) -> Steps:
        if list(self.at) != sorted(set(self.at)) or not all(0 < share < 1 for share in self.at):
            raise ValueError("at must ascend between 0 and 1")
        return self

    def after(self, step: int, steps: int) -> float:
        passed = sum(step >= share * steps for share in self.at)
        return max(self.final, self.factor_each**passed)


AnySchedule = Annotated[Cosine | WSD | Steps, Field(discriminator="kind")]
