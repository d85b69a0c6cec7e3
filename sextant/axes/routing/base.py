"""Contract of axis 4: who goes where, what happens when an expert is full, and what keeps the load even?

A router turns rows into a :class:`Routing`, in fp32. Everything that balance needs is in that record, which leaves the
model's forward as data: recomputation cannot count twice, and a caller can keep it, report it or feed it back.

Ties go to the lower number. A NaN logit wins every comparison and makes gates of its token NaN, so that it shows in the
loss, where the trainer's policy waits; an infinite one counts as the limit that the formula has there, or is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sextant.axes.stability import Role
from sextant.core.cost import At, Cost
from sextant.core.spec import Spec
from sextant.core.stream import Stream
from sextant.kernels.permute import counted


@dataclass(frozen=True)
class Usage:
    """What the experts of one layer had to hold for one forward.

    Attributes:
        rows: rows that went through products, those of padding included.
        peak: most rows that existed at once.
        rounds: passes over the experts.
        padding: rows of zeros among ``rows``.
    """

    rows: int | Tensor
    peak: int | Tensor
    rounds: int = 1
    padding: int | Tensor = 0

    def waste(self) -> float:
        """Share of the rows that held no copy."""
        return float(self.padding) / max(int(self.rows), 1)


@dataclass(frozen=True)
class Routing:
    """What one MoE layer decided for T tokens.

    Attributes:
        logits_TE: fp32 router scores before normalisation.
        probs_TE: fp32 probabilities, each row summing to one (differentiable): what balance losses read.
        experts_TA: int64, chosen experts of each token, best first.
        gates_TA: fp32 weights of the chosen experts (differentiable).
        kept_TA: bool, copies that reach their expert; None when all do. The gate of a dropped copy counts for nothing.
        sent_TA: bool, copies that the router wants; the others fill up the row of a token that has fewer, with a gate
            of 0. None when it wants all.
        load_TE: fp32, a smooth estimate of each token's chance to be sent (Shazeer 2017); None for other routers.
        usage: what the experts had to hold; filled in by the layer.
    """

    logits_TE: Tensor
    probs_TE: Tensor
    experts_TA: Tensor
    gates_TA: Tensor
    kept_TA: Tensor | None = None
    sent_TA: Tensor | None = None
    load_TE: Tensor | None = None
    usage: Usage | None = None

    def counts_E(self) -> Tensor:
        """int64, copies per expert as sent, dropped ones included; they sum to T·A where the router wants all."""
        return self._counted(self.sent_TA)

    def taken_E(self) -> Tensor:
        """int64, copies per expert that reach it; with :meth:`dropped` as many as were sent."""
        return self._counted(self.sent_TA if self.kept_TA is None else self.kept_TA)

    def dropped(self) -> int:
        """Copies that were sent and reached no expert."""
        return int(self.counts_E().sum() - self.taken_E().sum())

    def drop_rate(self) -> float:
        """Share of the copies sent that reached no expert."""
        return self.dropped() / max(int(self.counts_E().sum()), 1)

    def _counted(self, which_TA: Tensor | None) -> Tensor:
        """int64 ``[E]``; its shape does not depend on values, so compilers can follow."""
        experts = self.probs_TE.shape[1]
        if which_TA is None:
            return counted(self.experts_TA.flatten(), experts)
        return counted(self.experts_TA.where(which_TA, experts).flatten(), experts + 1)[:experts]


class Router(Spec):
    """Base of the routers. ``build(width, experts)`` gives a :class:`RouterModule`."""

    top_k: int
    estimates_load: ClassVar[bool] = False
    causal: ClassVar[bool] = True
    """Whether a token's experts are its own affair; if not, generation is another function than training."""

    def build(self, width: int, experts: int) -> RouterModule:
        raise NotImplementedError

    def fits(self, experts: int) -> None:
        """Raises ValueError when it cannot choose among this many experts."""
        if self.top_k > experts:
            raise ValueError(f"router.top_k {self.top_k} exceeds experts {experts}")

    def places(self, experts: int) -> int:
        """A: experts that the record of a token has room for."""
        return self.top_k

    def cost(self, width: int, experts: int, at: At) -> Cost:
        """One fp32 matrix, and the logits and probabilities it leaves."""
        return Cost.of_matrix(width, experts, at, keep_input=False) + Cost(activation_bytes=8 * experts)


class RouterModule(nn.Module):
    """Rows ``[T, D]`` to a :class:`Routing`; ``weight`` is [E, D], fp32."""

    role = Role.ROUTER

    def __init__(self, width: int, experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))

    def forward(self, x_TD: Tensor, chosen_TA: Tensor | None = None) -> Routing:
        """With ``chosen_TA`` the experts are given (a recorded choice) and only their gates are computed."""
        raise NotImplementedError

    def logits(self, x_TD: Tensor) -> Tensor:
        """``x W`` in the dtype of the weights, ``[T, E]``."""
        return F.linear(x_TD.to(self.weight.dtype), self.weight)


def best(scores_TE: Tensor, count: int) -> Tensor:
    """int64 ``[T, A]``: the experts with the largest scores, best first; a tie goes to the lower number."""
    order_TE = scores_TE.detach().sort(dim=-1, descending=True, stable=True).indices
    return order_TE[:, :count].contiguous()  # a view would keep the order of all for backward


class Stack(Protocol):
    """The experts of one layer, as :class:`~sextant.axes.capacity.stack.ExpertStack` holds them."""

    experts: int

    @property
    def stacks(self) -> tuple[Tensor, Tensor]:
        """The matrices of all experts, up and down."""
        ...

    def __call__(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        """Rows sorted by expert through their expert."""
        ...

    def one(self, x_ND: Tensor, up_DF: Tensor, down_FD: Tensor) -> Tensor:
        """Rows through the expert with these matrices."""
        ...

    def few(self, x_TD: Tensor, experts_TA: Tensor) -> Tensor | None:
        """``y_TAD`` without sorting, where that is faster and no gradient is wanted; else None."""
        ...


class Overflow(Spec):
    """Base of the capacity rules: which copies an expert takes, and how the rows of its share are laid out."""

    def fits(self, experts: int) -> None:
        """Raises ValueError when it cannot rule over this many experts."""

    def admit(self, routing: Routing, stream: Stream, training: bool) -> Routing:
        """The routing with ``kept_TA`` where copies are dropped; here all are taken."""
        return routing

    def compute(self, experts: Stack, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Usage]:
        """Dispatch, experts, combine: fp32 ``[T, D]``."""
        raise NotImplementedError

    @property
    def keeps_rows(self) -> bool:
        """Whether the experts' rows are kept for the backward, or computed once more there."""
        return True

    def padding(self, tokens: int, chosen: int, experts: int) -> float:
        """Rows of zeros to expect for so many tokens under even random routing."""
        return 0.0
