"""What one micro-batch adds to the step's loss.

Everything is a sum divided by a *global* count: token losses by the step's predicted tokens, balance terms and the
losses of separate indexers by its tokens. So accumulation, packing and parallelism agree, and gradients are summed,
never averaged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sextant.axes.attention import Selection
from sextant.core.stream import Stream
from sextant.kernels.loss import summed_loss
from sextant.model.transformer import Transformer
from sextant.train.balance import Balance


@dataclass(frozen=True)
class MicroLoss:
    """Of one micro-batch: ``total`` to go backward from; ``nats`` (summed token losses) and the rest for the log.

    The parts of a step's micro-batches add up.
    """

    total: Tensor
    nats: Tensor
    balance: Tensor
    indexer: Tensor

    def parts(self) -> dict[str, float]:
        """All but the total, by name."""
        return {name: float(value) for name, value in vars(self).items() if name != "total"}


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
