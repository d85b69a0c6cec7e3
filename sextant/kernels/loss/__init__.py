"""Head and cross-entropy as one step over chunks of tokens: logits of the whole batch never exist at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
CHUNK = {"cpu": 1024, "cuda": 8192}
"""Rows of logits at a time: what a CPU's cache likes, and enough to fill a GPU."""


def token_losses(x_TD: Tensor, head_PD: Tensor, targets_T: Tensor, softcap: float | None = None) -> Tensor:
    """Negative log-likelihood of every target in nats, fp32 ``[T]``, 0 where the target is ignored; no gradient kept.

    By plain operations, also the truth for :func:`summed_loss`.
    """
    logits_TP = F.linear(x_TD, head_PD.to(x_TD.dtype)).to(torch.promote_types(x_TD.dtype, torch.float32))
    if softcap is not None:
        logits_TP = softcap * torch.tanh(logits_TP / softcap)
    return F.cross_entropy(logits_TP, targets_T, ignore_index=IGNORE, reduction="none")


class _SummedLoss(torch.autograd.Function):
    """The gradient of a sum of cross-entropies is known once the logits are, so forward computes both."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, head_PD: Tensor, targets_T: Tensor, softcap: float | None, chunk: int
    ) -> Tensor:
        weight_PD = head_PD.to(x_TD.dtype)
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        loss = x_TD.new_zeros((), dtype=dtype)
        dx_TD = torch.empty_like(x_TD)
        dhead_PD = torch.zeros_like(head_PD)
        for x, target, dx in zip(x_TD.split(chunk), targets_T.split(chunk), dx_TD.split(chunk), strict=True):
            logits = F.linear(x, weight_PD).to(dtype)
            squashed = None if softcap is None else torch.tanh(logits / softcap)
            if squashed is not None and softcap is not None:
                logits = softcap * squashed
            picked = target.clamp_min(0)[:, None]
            ignored = (target == IGNORE).nonzero()[:, 0]
            top = logits.amax(-1, keepdim=True)
            right = logits.gather(1, picked)
            grad = logits.softmax(-1)
            lse = top - grad.amax(-1, keepdim=True).log()
            loss += (lse - right).index_fill_(0, ignored, 0).sum()
            grad.scatter_add_(1, picked, grad.new_full(picked.shape, -1.0)).index_fill_(0, ignored, 0)
            if squashed is not None:
                grad *= 1 - squashed.square()
            grad = grad.to(x.dtype)
            torch.mm(grad, weight_PD, out=dx)
            dhead_PD += grad.t() @ x
        ctx.save_for_backward(dx_TD, dhead_PD)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dx_TD, dhead_PD = ctx.saved_tensors
        return dx_TD * grads[0].to(dx_TD.dtype), dhead_PD * grads[0].to(dhead_PD.dtype), None, None, None


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
