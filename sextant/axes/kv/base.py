"""Contract of axis 2: what is projected, cached and shared?

A KV option builds a :class:`Projections` and says how wide a cached row is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from sextant.axes.numerics import Numerics
from sextant.core.cost import At, Cost
from sextant.core.spec import Spec
from sextant.core.state import Keys, RowSpec
from sextant.core.stream import Stream
from sextant.kernels.attention import Scores


@dataclass(frozen=True)
class Heads:
    """What the tokens of a step bring to attention.

    Attributes:
        q_THK, k_TGK, v_TGV: in the compute dtype, position code applied.
        plain_q_THK, plain_k_TGK: the same before the position code; None where no such rows exist (latents).
        kept: the rows that a decoding state keeps in place of k and v, or None.
        multiply_out: makes per-head keys of the rows in a decoding state; set where k and v are per head and the state
            keeps other rows, whose earlier ones the pattern must multiply out before it reads them.
        latent: values are latents, and so is what attention returns.
        q_latent_TR: compressed rows that the queries were projected from, or None.
    """

    q_THK: Tensor
    k_TGK: Tensor
    v_TGV: Tensor
    plain_q_THK: Tensor | None = None
    plain_k_TGK: Tensor | None = None
    kept: tuple[Tensor, Tensor] | None = None
    multiply_out: Callable[[Keys], Keys] | None = None
    latent: bool = False
    q_latent_TR: Tensor | None = None

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """What a decoding state keeps of these tokens."""
        return self.kept or (self.k_TGK, self.v_TGV)


class Projections(nn.Module):
    """Base of the modules that KV options build."""

    @property
    def scores(self) -> Scores:
        """How a score is made of a query and a key."""
        raise NotImplementedError

    def project(self, x_TD: Tensor, stream: Stream, reads_state: bool = False) -> Heads:
        """Queries, keys and values of the step's tokens; ``reads_state`` says that, where there is a state, all keys
        will come from it, also in the first step (see :class:`~sextant.axes.attention.base.Attention`).
        """
        raise NotImplementedError

    def output(self, o_THV: Tensor, heads: Heads) -> Tensor:
        """``[T, H, V] -> [T, D]``, of what attention made of ``heads``."""
        raise NotImplementedError


class KV(Spec):
    """Base of the KV options."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Query heads H, key heads G, and the widths K and V of their rows, as attention in training sees them."""
        raise NotImplementedError

    def row(self, window: int | None = None, sinks: int = 0) -> RowSpec:
        """What a decoding state keeps of each token, for as long as a pattern says."""
        _, groups, k_dim, v_dim = self.shape
        return RowSpec(groups, k_dim, v_dim, window, sinks)

    def query_width(self, width: int) -> int:
        """Width of the rows that queries are projected from: the model's, or that of their latents."""
        return width

    def build(self, width: int, numerics: Numerics) -> Projections:
        raise NotImplementedError

    def cost(self, width: int, at: At) -> Cost:
        """The projections; scores and state belong to the pattern."""
        raise NotImplementedError
