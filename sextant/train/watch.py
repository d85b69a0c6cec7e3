"""Watching for trouble: loss spikes, values that are not finite, and where they began."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from sextant.core.stream import Stream
from sextant.train.run import Spikes


class SpikeWatch:
    """The last losses and gradient norms, and whether the next ones stand out (as OLMo-core's skip-step optimiser)."""

    def __init__(self, policy: Spikes):
        self.policy = policy
        self.losses: deque[float] = deque(maxlen=policy.window)
        self.norms: deque[float] = deque(maxlen=policy.window)
        self.in_a_row = 0
        self.skipped = 0

    def is_spike(self, loss: float, norm: float) -> bool:
        """Judge a step before its update, then let it into the window.

        A spike enters too: a lasting change of level widens the window until it passes, where a window without it
        would skip for ever.
        """
        spike = self._stands_out(loss, self.losses) or self._stands_out(norm, self.norms)
        self.losses.append(loss)
        self.norms.append(norm)
        self.in_a_row = self.in_a_row + 1 if spike else 0
        self.skipped += spike
        return spike

    @property
    def exhausted(self) -> bool:
        """Whether too many steps in a row were skipped."""
        return self.in_a_row >= self.policy.patience

    def _stands_out(self, value: float, window: deque[float]) -> bool:
        if 2 * len(window) < self.policy.window:
            return False
        mean = sum(window) / len(window)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in window) / len(window))
        return value > mean + self.policy.sigmas * deviation

    def state_dict(self) -> dict[str, Any]:
        """Plain data for the checkpoint: a resumed run judges as the unbroken one would."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "in_a_row": self.in_a_row,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take saved data back."""
        self.losses.extend(state["losses"])
        self.norms.extend(state["norms"])
        self.in_a_row, self.skipped = state["in_a_row"], state["skipped"]


@torch.no_grad()
def first_non_finite(model: nn.Module, tokens_T: Tensor, stream: Stream) -> str:
    """Run the batch once more and name the first parameter or module output that is not finite, in forward order."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"parameter {name}"
    found: list[str] = []
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: _note(found, name, out))
        for name, module in model.named_modules()
        if name
    ]
    try:
        model(tokens_T, stream, ahead=True)
    finally:
        for hook in hooks:
            hook.remove()
    return f"output of {found[0]}" if found else "the loss"


def _note(found: list[str], name: str, out: Any) -> None:
    tensors = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)]
    if any(not torch.isfinite(x).all() for x in tensors):
        found.append(name)


def non_finite_gradients(model: nn.Module, limit: int = 3) -> list[str]:
    """Names of parameters whose gradient is not finite, at most ``limit``."""
    bad = (n for n, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all())
    return [name for _, name in zip(range(limit), bad, strict=False)]
