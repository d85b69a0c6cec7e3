"""What one micro-batch adds to the step's loss.

Everything is a sum divided by a *global* count: token losses by the step's predicted tokens, balance terms and the
losses of separate indexers by its tokens. So accumulation, packing and parallelism agree, and gradients are summed,
never averaged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sextant.axes.attention import Selection
from sextant.core.stream import Stream
from sextant.kernels.loss import summed_loss
from sextant.model.transformer import Output, Transformer
from sextant.train.balance import Balance


@dataclass(frozen=True)
class MicroLoss:
    """Of one micro-batch: ``total`` to go backward from; ``nats`` (summed token losses) and the rest for the log.

    ``mtp`` is summed as ``nats`` is: token losses of the prediction modules, their mean over the modules, no lambda.

    The parts of a step's micro-batches add up.
    """

    total: Tensor
    nats: Tensor
    balance: Tensor
    indexer: Tensor
    mtp: Tensor

    def parts(self) -> dict[str, float]:
        """All but the total, by name."""
        return {name: float(value) for name, value in vars(self).items() if name != "total"}

    def detached(self) -> MicroLoss:
        """Without its graph."""
        return replace(self, total=self.total.detach())


def micro_loss(
    model: Transformer,
    tokens_T: Tensor,
    targets_T: Tensor,
    stream: Stream,
    balance: Balance,
    predicted: int,
    tokens: int,
    mtp_weight: float = 0.0,
) -> MicroLoss:
    """Forward of one micro-batch, its copies counted; the arguments are those of :func:`loss_of`."""
    out = model(tokens_T, stream, ahead=mtp_weight > 0)
    balance.count([out.all_routings])
    return loss_of(model, out, targets_T, stream, balance, predicted, tokens, mtp_weight)


def loss_of(
    model: Transformer,
    out: Output,
    targets_T: Tensor,
    stream: Stream,
    balance: Balance,
    predicted: int,
    tokens: int,
    mtp_weight: float = 0.0,
) -> MicroLoss:
    """The loss of a micro-batch that went forward and was counted.

    Args:
        predicted: targets of the whole step that are not ignored.
        tokens: tokens of the whole step.
        mtp_weight: lambda of the prediction modules; they did not run at 0.
    """
    nats = summed_loss(out.hidden_TD, model.head_PD, targets_T, softcap=model.spec.softcap)
    extra = balance.loss(out.routings, stream, tokens)
    for one in out.ahead:
        extra = extra + balance.loss(one.out.routings, one.stream, tokens)
    learnt = indexer_loss(out.all_selections, tokens).to(nats.device)
    further = ahead_nats(model, out, targets_T)
    total = (nats + mtp_weight * further) / predicted + extra + learnt
    return MicroLoss(total, nats.detach(), extra.detach(), learnt.detach(), further.detach())


def ahead_nats(model: Transformer, out: Output, targets_T: Tensor) -> Tensor:
    """Token losses of the prediction modules, summed over tokens and averaged over modules (spec deepseek-v3, 3.1).

    The divisor of the step is that of the main loss, as in the paper, though module ``k`` has ``k`` targets fewer in
    each sequence.
    """
    total = out.hidden_TD.new_zeros((), dtype=torch.promote_types(out.hidden_TD.dtype, torch.float32))
    for one in out.ahead:
        targets = targets_T[one.read_T]
        total = total + summed_loss(one.out.hidden_TD, model.head_PD, targets, softcap=model.spec.softcap)
    return total / max(1, len(model.mtp))


def indexer_loss(selections: dict[int, Selection], tokens: int) -> Tensor:
    """What separate indexers (SeerAttention's gates, DSA) learn from, over the ``tokens`` of the step; 0 without any.

    The language loss gives them no gradient (spec sparse-attention, rule 5).
    """
    losses = [selection.loss for selection in selections.values() if selection.loss is not None]
    return torch.stack(losses).sum() / tokens if losses else torch.zeros(())
