"""Which keys a query may read by distance alone, and how a score is made of a query and a key."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Span:
    """A static causal span: the last ``window`` keys (itself included; None: all) and the first ``sinks`` keys."""

    window: int | None = None
    sinks: int = 0

    def visible(self, q_T: Tensor, k_S: Tensor) -> Tensor:
        """bool [..., T, S] from positions within one sequence; a key position below 0 is an empty slot."""
        q, k = q_T[..., :, None], k_S[..., None, :]
        seen = (k <= q) & (k >= 0)
        if self.window is None:
            return seen
        return seen & ((q - k < self.window) | (k < self.sinks))

    def mean_keys(self, tokens: int) -> float:
        """Keys read per query, averaged over the positions of one sequence."""
        if self.window is None or tokens <= self.window:
            return (tokens + 1) / 2
        w, s, far = self.window, self.sinks, tokens - self.window
        near = w - w * (w - 1) / (2 * tokens)
        ramp = min(s, far)
        return near + (ramp * (ramp + 1) / 2 + s * (far - ramp)) / tokens


@dataclass(frozen=True)
class Scores:
    """``score = scale * q.k - slope * distance``; ``slopes_H`` is ALiBi's slope of each head, or None."""

    scale: float
    slopes_H: Tensor | None = None
