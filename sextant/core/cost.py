"""What a part costs: one record that adds up from a norm's gain to a whole model.

The rules of counting are stated with each field, because the sources differ; ``tests/contracts/test_cost.py`` holds
the formulas to meta-built models, a FLOP counter and measured buffers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class At:
    """The operating point that a cost is asked for: sequence length and bytes per activation or state element."""

    tokens: int
    itemsize: int = 2


@dataclass(frozen=True)
class Cost:
    """Costs of one part at one operating point; ``a + b`` and ``n * a`` do what they say.

    Attributes:
        params: stored parameters.
        active_params: parameters that one token meets: embeddings and head included, of E experts only the chosen A.
        flops: forward FLOPs per token (2 per multiply-add), mean over a causal sequence of ``at.tokens``; embedding
            look-ups count 0, norms and activations are left out.
        state_bytes: decoding state held for one sequence of ``at.tokens``.
        read_bytes: decoding state read by the step after ``at.tokens`` tokens.
        activation_bytes: kept for backward, per token, without recomputation.
        exchange_bytes: sent and received by expert-parallel dispatch and combine, forward, per token.
        padding_flops: forward FLOPs per token that rows of zeros cost on top, expected under even random routing of one
            sequence of ``at.tokens`` (more tokens at once need fewer zeros each).
    """

    params: int = 0
    active_params: int = 0
    flops: float = 0.0
    state_bytes: int = 0
    read_bytes: int = 0
    activation_bytes: float = 0.0
    exchange_bytes: float = 0.0
    padding_flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __rmul__(self, times: int) -> Cost:
        return Cost(*(times * getattr(self, f.name) for f in fields(self)))

    def __radd__(self, other: int) -> Cost:
        """Lets ``sum()`` start from 0."""
        return self

    @classmethod
    def of_matrix(cls, inputs: int, outputs: int, at: At, keep_input: bool = True) -> Cost:
        """A weight matrix that every token meets; its input is kept for backward unless another matrix keeps it."""
        n = inputs * outputs
        return cls(n, n, 2.0 * n, activation_bytes=at.itemsize * inputs if keep_input else 0)
