"""Contract of axis 1: which keys does a query read?

A pattern is a declaration that says what it sees (``span``), what it must remember (``state``), what it costs, and
builds a module ``(q_THK, keys, x_TD, stream, scores) -> o_THV``. Packed sequences never see each other.
"""

from __future__ import annotations

from torch import Tensor, nn

from sextant.core.cost import At, Cost
from sextant.core.spec import Spec
from sextant.core.state import Keys, StateSpec
from sextant.core.stream import Stream
from sextant.kernels.attention import Scores, Span, attend


class Pattern(Spec):
    """Base of the attention options."""

    def build(self, width: int) -> nn.Module:
        raise NotImplementedError

    def state(self, groups: int, k_dim: int, v_dim: int) -> StateSpec:
        """What a layer remembers, given rows of ``groups`` x (``k_dim`` + ``v_dim``) elements."""
        raise NotImplementedError

    def cost(self, heads: int, groups: int, k_dim: int, v_dim: int, at: At) -> Cost:
        """Scores, sums and state; projections belong to the KV option."""
        raise NotImplementedError


class SpanPattern(Pattern):
    """A pattern that is a static span: full attention, windows, sinks. No parameters."""

    @property
    def span(self) -> Span:
        raise NotImplementedError

    def build(self, width: int) -> nn.Module:
        return SpanAttention(self.span)

    def state(self, groups: int, k_dim: int, v_dim: int) -> StateSpec:
        return StateSpec(groups, k_dim, v_dim, self.span.window, self.span.sinks)

    def cost(self, heads: int, groups: int, k_dim: int, v_dim: int, at: At) -> Cost:
        """FLOPs ``2 H (K + V)`` per key read, keys averaged over the sequence (causal counting)."""
        state = self.state(groups, k_dim, v_dim).nbytes(at.tokens, at.itemsize)
        kept = at.itemsize * (heads * (k_dim + v_dim) + groups * (k_dim + v_dim)) + 4 * heads
        return Cost(
            flops=2.0 * heads * (k_dim + v_dim) * self.span.mean_keys(at.tokens),
            state_bytes=state,
            read_bytes=state,
            activation_bytes=kept,
        )


class SpanAttention(nn.Module):
    """Softmax attention over a static span."""

    def __init__(self, span: Span):
        super().__init__()
        self.span = span

    def forward(self, q_THK: Tensor, keys: Keys, x_TD: Tensor, stream: Stream, scores: Scores) -> Tensor:
        return attend(q_THK, keys, stream, self.span, scores)
