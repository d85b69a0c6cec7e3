"""The gradients of one optimiser step: micro-batches forward, counted, backward, summed.

They go in waves of as many as there are lanes. Gradients are added in the order of the micro-batches whatever the
number of lanes, so a step gives the same bits again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sextant.axes.routing import Routing
from sextant.data.loader import Batch
from sextant.model.transformer import Output, Transformer
from sextant.train.balance import Balance
from sextant.train.lanes import Lanes
from sextant.train.loss import MicroLoss, loss_of


@dataclass(frozen=True)
class Whole:
    """What a micro-batch must know of its step: both divisors of the loss and lambda of the prediction modules."""

    predicted: int
    tokens: int
    mtp_weight: float = 0.0

    @classmethod
    def of(cls, batches: Sequence[Batch], mtp_weight: float = 0.0) -> Whole:
        """The sums over a step's micro-batches."""
        predicted, tokens = sum(b.predicted for b in batches), sum(b.tokens_T.numel() for b in batches)
        return cls(predicted, tokens, mtp_weight)


class Backward:
    """Leaves the step's gradients in ``.grad``, on top of what is there.

    ``seed`` is called with the number of a micro-batch before its forward, also before that which only counts.
    """

    def __init__(
        self, model: Transformer, balance: Balance, lanes: Lanes, seed: Callable[[int], object] = torch.manual_seed
    ):
        self.model, self.balance, self.lanes, self.seed = model, balance, lanes, seed
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def __call__(self, batches: Sequence[Batch], mtp_weight: float = 0.0) -> list[MicroLoss]:
        """Losses of the micro-batches, in order."""
        whole, width = Whole.of(batches, mtp_weight), self.lanes.count
        waves = {first: batches[first : first + width] for first in range(0, len(batches), width)}
        self.balance.start()
        self.model.train()
        if self.balance.ahead and len(waves) > 1:
            self.balance.foresee(self._routings(waves, whole))
        return [loss for first, wave in waves.items() for loss in self._learn(first, wave, whole)]

    def _routings(self, waves: Mapping[int, Sequence[Batch]], whole: Whole) -> Iterator[dict[int, Routing]]:
        """What all micro-batches will choose. Gradients stay on: the same kernels give the same choice."""
        for first, wave in waves.items():
            yield from (out.all_routings for out in self._forward(first, wave, whole))

    def _learn(self, first: int, wave: Sequence[Batch], whole: Whole) -> list[MicroLoss]:
        """Forward and backward of micro-batches side by side; they meet once, to count."""
        outs = self._forward(first, wave, whole)
        self.balance.count([out.all_routings for out in outs])
        if len(wave) == 1:
            loss = self._loss(whole, wave[0], outs[0])
            loss.total.backward()
            return [loss.detached()]
        losses, gradients = zip(*self.lanes.map(partial(self._gradients, whole), wave, outs), strict=True)
        for parameter, *parts in zip(self.parameters, *gradients, strict=True):
            parameter.grad = added(parameter.grad, *parts)
        return list(losses)

    def _forward(self, first: int, wave: Sequence[Batch], whole: Whole) -> list[Output]:
        self.seed(first)
        return self.lanes.map(lambda one: self.model(one.tokens_T, one.stream, ahead=whole.mtp_weight > 0), wave)

    def _loss(self, whole: Whole, batch: Batch, out: Output) -> MicroLoss:
        return loss_of(
            self.model, out, batch.targets_T, batch.stream, self.balance, whole.predicted, whole.tokens,
            whole.mtp_weight,
        )

    def _gradients(self, whole: Whole, batch: Batch, out: Output) -> tuple[MicroLoss, tuple[Tensor | None, ...]]:
        """The lane's own gradients: ``.grad`` belongs to all."""
        loss = self._loss(whole, batch, out)
        return loss.detached(), torch.autograd.grad(loss.total, self.parameters, allow_unused=True)


def added(*parts: Tensor | None) -> Tensor | None:
    """The sum from left to right in memory of its own; what autograd hands out may belong to two parameters."""
    found = [part for part in parts if part is not None]
    if len(found) == 1:
        return found[0].clone()
    return sum(found[1:], start=found[0]) if found else None
