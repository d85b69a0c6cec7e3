"""Head and cross-entropy as one step over chunks of tokens: logits of the whole batch never exist at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sextant.kernels import matmul

IGNORE = -100
"""Target of a token that nothing is to be predicted after."""

CHUNK = {"cpu": 512, "cuda": 8192}
"""Rows of logits at a time: what a CPU's cache likes, and enough to fill a GPU."""

APART = 16
"""Elements between rows of logits on a CPU: rows a power of two apart share cache sets, and the head's weight gradient,
which reads across them, runs at 83 GF/s a core instead of 97."""

LOG2_E = math.log2(math.e)

Shares = Callable[[Tensor, Tensor, Tensor], Tensor | None]
"""Fills its last argument with softmax of the first, or with multiples of it by row: then it returns these."""


def token_losses(x_TD: Tensor, head_PD: Tensor, targets_T: Tensor, softcap: float | None = None) -> Tensor:
    """Negative log-likelihood of every target in nats, fp32 ``[T]``, 0 where the target is ignored; no gradient kept.

    By plain operations, also the truth for :func:`summed_loss`.
    """
    logits_TP = matmul.linear(x_TD, head_PD.to(x_TD.dtype)).to(torch.promote_types(x_TD.dtype, torch.float32))
    if softcap is not None:
        logits_TP = softcap * torch.tanh(logits_TP / softcap)
    return F.cross_entropy(logits_TP, targets_T, ignore_index=IGNORE, reduction="none")


class _SummedLoss(torch.autograd.Function):
    """The gradient of a sum of cross-entropies is known once the logits are, so forward computes both.

    One buffer of a chunk serves all chunks, a second one where the loss is wider than the product: fresh memory of that
    size costs more than what is computed in it.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, head_PD: Tensor, targets_T: Tensor, softcap: float | None, chunk: int
    ) -> Tensor:
        weight_PD = head_PD.to(x_TD.dtype)
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        loss = x_TD.new_zeros((), dtype=dtype)
        dx_TD = torch.empty_like(x_TD)
        dhead_PD = torch.zeros_like(head_PD)
        in_place = dtype == x_TD.dtype and x_TD.device.type == "cpu"
        product = _buffer(x_TD, min(chunk, x_TD.shape[0]), head_PD.shape[0], APART if in_place else 0)
        probs = product if in_place else torch.empty_like(product, dtype=dtype)
        shares = _exponentials if in_place else _softmax
        for x, target, dx in zip(x_TD.split(chunk), targets_T.split(chunk), dx_TD.split(chunk), strict=True):
            logits = matmul.mm_into(x, weight_PD.t(), product[: len(x)]).to(dtype)
            nats, grad, scale_T1 = _losses_and_gradient(logits, target, softcap, probs[: len(x)], shares)
            loss += nats
            grad = grad.to(x.dtype)
            matmul.mm_into(grad, weight_PD, dx)
            if scale_T1 is not None:
                dx *= scale_T1
                x = x * scale_T1
            if grad.dtype == dhead_PD.dtype:
                dhead_PD.addmm_(grad.t(), x)
            else:
                dhead_PD += matmul.mm(grad.t(), x)
        ctx.save_for_backward(dx_TD, dhead_PD)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dx_TD, dhead_PD = ctx.saved_tensors
        return dx_TD * grads[0].to(dx_TD.dtype), dhead_PD * grads[0].to(dhead_PD.dtype), None, None, None


def _buffer(x_TD: Tensor, rows: int, columns: int, apart: int) -> Tensor:
    """``[rows, columns]`` with so many unused elements between rows."""
    return x_TD.new_empty(rows, columns + apart)[:, :columns]


def _losses_and_gradient(
    logits_TP: Tensor, target_T: Tensor, softcap: float | None, probs_TP: Tensor, shares: Shares
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Summed loss of a chunk and its gradient by the logits, written into ``probs_TP``, which may be their memory.

    The last of the three is what each row of the gradient is still to be multiplied by, if anything.
    """
    squashed_TP = None if softcap is None else torch.tanh(logits_TP / softcap)
    if squashed_TP is not None and softcap is not None:
        logits_TP = softcap * squashed_TP
    picked_T1 = target_T.clamp_min(0)[:, None]
    ignored = (target_T == IGNORE).nonzero()[:, 0]
    peak_T1, wanted_T1 = logits_TP.amax(-1, keepdim=True), logits_TP.gather(1, picked_T1)
    total_T1 = shares(logits_TP, peak_T1, probs_TP)
    mass_T1 = probs_TP.amax(-1, keepdim=True).reciprocal() if total_T1 is None else total_T1
    nats = (peak_T1 + mass_T1.log() - wanted_T1).index_fill_(0, ignored, 0).sum()
    one_T1 = probs_TP.new_ones(picked_T1.shape) if total_T1 is None else total_T1
    probs_TP.scatter_add_(1, picked_T1, -one_T1).index_fill_(0, ignored, 0)
    if squashed_TP is not None:
        probs_TP *= 1 - squashed_TP.square()
    return nats, probs_TP, None if total_T1 is None else total_T1.reciprocal()


def _softmax(logits_TP: Tensor, peak_T1: Tensor, probs_TP: Tensor) -> None:
    """Probabilities: one pass on a GPU."""
    torch.softmax(logits_TP, -1, out=probs_TP)


def _exponentials(logits_TP: Tensor, peak_T1: Tensor, probs_TP: Tensor) -> Tensor:
    """Probabilities times their row's total, which is returned; faster on a CPU than softmax, and takes any strides."""
    torch.sub(logits_TP, peak_T1, out=probs_TP)
    torch.exp2(probs_TP.mul_(LOG2_E), out=probs_TP)
    return probs_TP.sum(-1, keepdim=True)


def summed_loss(
    x_TD: Tensor, head_PD: Tensor, targets_T: Tensor, softcap: float | None = None, chunk: int | None = None
) -> Tensor:
    """Sum over tokens of the cross-entropy in nats (fp32 scalar): divide by the global token count outside.

    Args:
        x_TD: final hidden rows in the compute dtype.
        head_PD: output matrix, fp32 master; its gradient is accumulated over chunks in its own dtype.
        targets_T: int64; :data:`IGNORE` counts nothing.
    """
    chunk = chunk or CHUNK.get(x_TD.device.type, 1024)
    return _SummedLoss.apply(x_TD, head_PD, targets_T, softcap, chunk)  # type: ignore[return-value]
