"""Balance over one optimiser step: what its terms sum up, what they add to the loss, what they change after it.

All of it lives outside forward, so recomputation cannot count twice. ``reduce`` is the one place where ranks meet: it
gives the sum of a tensor over them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sextant.axes.capacity import Experts
from sextant.axes.routing import BalanceLoss, BalanceTerm, BalanceUpdate, Routing, Usage
from sextant.core.stream import Stream
from sextant.model.spec import ModelSpec
from sextant.model.transformer import Transformer

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Load:
    """How one MoE layer's copies were spread over a step, and what its experts held.

    Attributes:
        max_over_mean: busiest expert over the mean, as chosen.
        unused: share of experts that received nothing.
        entropy: of the load, over its maximum log E: 1 is even.
        max_vio: (max - mean) / mean (2408.15664, equation 4).
        drop_rate: share of the copies that reached no expert.
        padding_waste: share of the rows in products that held no copy.
        peak_rows: most rows that existed at once in one forward.
        rounds: most passes over the experts in one forward.
    """

    max_over_mean: float
    unused: float
    entropy: float
    max_vio: float = 0.0
    drop_rate: float = 0.0
    padding_waste: float = 0.0
    peak_rows: int = 0
    rounds: int = 1


class Tally:
    """What one layer's routings of a step add up to; what is on a device stays there until it is read."""

    def __init__(self):
        self.counts: list[Tensor] = []
        self.dropped: list[Tensor] = []
        self.usages: list[Usage] = []

    def add(self, routing: Routing) -> None:
        """One more forward of the layer."""
        self.counts.append(routing.counts_E())
        if routing.kept_TA is not None:
            self.dropped.append((self.counts[-1] - routing.taken_E()).sum())
        if routing.usage is not None:
            self.usages.append(routing.usage)

    def load(self, reduce: Reduce) -> Load:
        """The numbers for the log: sums over ranks, peaks of this one."""
        counts_E = torch.stack(self.counts).sum(0)
        rest = (sum(self.dropped), sum(usage.rows for usage in self.usages), sum(u.padding for u in self.usages))
        *counts, dropped, rows, padding = reduce(torch.cat([counts_E, counts_E.new_tensor(rest)])).tolist()
        total, experts = max(1, sum(counts)), len(counts)
        shares = [count / total for count in counts if count]
        entropy = -sum(share * math.log(share) for share in shares) / math.log(experts) if experts > 1 else 1.0
        busiest = max(counts) * experts / total
        return Load(
            max_over_mean=busiest, unused=counts.count(0) / experts, entropy=entropy, max_vio=busiest - 1,
            drop_rate=dropped / total, padding_waste=padding / max(1, rows),
            peak_rows=max((int(usage.peak) for usage in self.usages), default=0),
            rounds=max((usage.rounds for usage in self.usages), default=1),
        )


def alone(sums: Tensor) -> Tensor:
    """One rank: its sums are everyone's."""
    return sums


class Balance:
    """Balance terms of all MoE layers, those of prediction modules included, over one step.

    ``start``, then for each micro-batch ``count`` and ``loss``, then ``update`` after the optimiser. Where ``ahead``
    says so and not all micro-batches are counted at once, ``foresee`` comes before the first ``loss``; without it,
    scope ``global_batch`` sees what has been counted so far, as ``running`` does.
    """

    def __init__(self, model: ModelSpec, reduce: Reduce = alone):
        self.reduce = reduce
        self.terms: dict[int, tuple[BalanceTerm, ...]] = {
            index: layer.feed_forward.balance
            for index, layer in enumerate(model.all_layers)
            if isinstance(layer.feed_forward, Experts)
        }
        self.ahead = any(isinstance(t, BalanceLoss) and t.ahead for terms in self.terms.values() for t in terms)
        self.start()

    def start(self) -> None:
        """Forget the last step."""
        self.tallies: dict[int, Tally] = {}
        self.sums: dict[tuple[int, int], Tensor] = {}
        self.whole: dict[tuple[int, int], Tensor] = {}
        self.foreseen = False

    def foresee(self, step: Iterable[dict[int, Routing]]) -> None:
        """Sum up the routings of all the step's micro-batches before the first of them is learnt from."""
        for routings in step:
            self._sum(routings)
            del routings  # and its graph, before the next forward
        self.whole = {key: self.reduce(own) for key, own in self.sums.items()}
        self.foreseen = True

    def count(self, wave: Sequence[dict[int, Routing]]) -> None:
        """Take in the copies of micro-batches that are learnt from next, one or several at once."""
        for routings in wave:
            for index, routing in routings.items():
                self.tallies.setdefault(index, Tally()).add(routing)
            if not self.foreseen:
                self._sum(routings)
        if not self.foreseen:
            losses = [key for key in self.sums if isinstance(self._term(*key), BalanceLoss)]
            self.whole |= {key: self.reduce(self.sums[key]) for key in losses}

    def loss(self, routings: dict[int, Routing], stream: Stream, tokens: int) -> Tensor:
        """Losses of one micro-batch that was counted; changes nothing."""
        total = torch.zeros((), device=stream.positions_T.device)
        for index, routing in routings.items():
            for place, term in enumerate(self.terms[index]):
                if isinstance(term, BalanceLoss):
                    total = total + term.loss(routing, stream, self.whole.get((index, place)), tokens)
        return total

    @torch.no_grad()
    def update(self, model: Transformer, progress: float) -> None:
        """Let selection biases follow the step's counts; ``progress`` is the share of the run that is done."""
        for (index, place), own in self.sums.items():
            term = self._term(index, place)
            if isinstance(term, BalanceUpdate):
                router = model.all_blocks[index].feed_forward.get_submodule("router")
                term.update(router, self.whole[index, place] if self.foreseen else self.reduce(own), progress)

    def loads(self) -> dict[int, Load]:
        """Load by MoE layer over the step."""
        return {index: tally.load(self.reduce) for index, tally in self.tallies.items()}

    def _sum(self, routings: dict[int, Routing]) -> None:
        for index, routing in routings.items():
            for place, term in enumerate(self.terms[index]):
                own = term.tally(routing)
                if own is not None:
                    before = self.sums.get((index, place))
                    self.sums[index, place] = own if before is None else before + own

    def _term(self, index: int, place: int) -> BalanceTerm:
        return self.terms[index][place]
