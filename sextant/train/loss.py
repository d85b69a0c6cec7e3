"""What one micro-batch adds to the step's loss, and the counts that balance needs.

Everything is a sum divided by a *global* count: token losses by the step's predicted tokens, balance terms and the
losses of separate indexers by its tokens. So accumulation, packing and parallelism agree, and gradients are summed,
never averaged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sextant.axes.attention import Selection
from sextant.axes.capacity import Experts
from sextant.axes.routing import Routing
from sextant.core.stream import Stream
from sextant.kernels.loss import summed_loss
from sextant.model.spec import ModelSpec
from sextant.model.transformer import Transformer


@dataclass(frozen=True)
class MicroLoss:
    """Of one micro-batch: ``total`` to go backward from; ``nats`` (summed token losses) and the rest for the log."""

    total: Tensor
    nats: Tensor
    balance: Tensor
    indexer: Tensor


@dataclass(frozen=True)
class Load:
    """How one MoE layer's copies were spread over a step.

    Attributes:
        peak: busiest expert over the mean.
        unused: share of experts that received nothing.
        entropy: of the load, over its maximum log E: 1 is even.
    """

    peak: float
    unused: float
    entropy: float


class Balance:
    """Copies per expert and MoE layer over one step; lives outside forward, so recomputation cannot count twice."""

    def __init__(self, model: ModelSpec):
        self.terms = {
            index: layer.feed_forward.balance
            for index, layer in enumerate(model.layers)
            if isinstance(layer.feed_forward, Experts)
        }
        self.counts: dict[int, Tensor] = {}

    def start(self) -> None:
        """Forget the last step."""
        self.counts = {}

    def loss(self, routings: dict[int, Routing], stream: Stream, tokens: int) -> Tensor:
        """Balance terms of this micro-batch, after counting its copies."""
        total = torch.zeros((), device=stream.positions_T.device)
        for index, routing in routings.items():
            counts_E = self._count(index, routing)
            for term in self.terms[index]:
                total = total + term.loss(routing, stream, counts_E, tokens)
        return total

    def _count(self, index: int, routing: Routing) -> Tensor:
        new = routing.counts_E()
        self.counts[index] = self.counts[index] + new if index in self.counts else new
        return self.counts[index]

    def loads(self) -> dict[int, Load]:
        """Load by MoE layer over the step."""
        return {index: _load(counts.tolist()) for index, counts in self.counts.items()}


def _load(counts: list[int]) -> Load:
    total, experts = sum(counts), len(counts)
    shares = [count / total for count in counts if count]
    entropy = -sum(share * math.log(share) for share in shares) / math.log(experts) if experts > 1 else 1.0
    return Load(max(counts) * experts / total, counts.count(0) / experts, entropy)


def micro_loss(
    model: Transformer,
    tokens_T: Tensor,
    targets_T: Tensor,
    stream: Stream,
    balance: Balance,
    predicted: int,
    tokens: int,
) -> MicroLoss:
    """Forward of one micro-batch.

    Args:
        predicted: targets of the whole step that are not ignored.
        tokens: tokens of the whole step.
    """
    out = model(tokens_T, stream)
    nats = summed_loss(out.hidden_TD, model.head_PD, targets_T, softcap=model.spec.softcap)
    extra = balance.loss(out.routings, stream, tokens)
    learnt = indexer_loss(out.selections, tokens).to(nats.device)
    return MicroLoss(nats / predicted + extra + learnt, nats.detach(), extra.detach(), learnt.detach())


def indexer_loss(selections: dict[int, Selection], tokens: int) -> Tensor:
    """What separate indexers (SeerAttention's gates, DSA) learn from, over the ``tokens`` of the step; 0 without any.

    The language loss gives them no gradient (spec sparse-attention, rule 5).
    """
    losses = [selection.loss for selection in selections.values() if selection.loss is not None]
    return torch.stack(losses).sum() / tokens if losses else torch.zeros(())
