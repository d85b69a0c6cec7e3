"""Held-out loss as nats per token and bits per byte: the form that does not depend on the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sextant.data.loader import Batch, bytes_of
from sextant.kernels.loss import token_losses
from sextant.model.transformer import Transformer


@dataclass(frozen=True)
class HeldOut:
    """Sums over held-out targets."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / max(1, self.tokens)

    @property
    def bpb(self) -> float:
        """Bits per byte of the text that the targets stand for."""
        return self.nats / math.log(2) / max(1, self.bytes)


@torch.no_grad()
def evaluate(model: Transformer, batches: Iterable[Batch], bytes_P: Tensor, limit: int | None = None) -> HeldOut:
    """Losses of held-out batches, up to ``limit`` tokens; dropout off, the model's mode put back."""
    was_training = model.training
    model.eval()
    nats, tokens, size = 0.0, 0, 0
    for batch in batches:
        batch = batch.to(model.embedding.weight.device)
        hidden_TD = model(batch.tokens_T, batch.stream).hidden_TD
        for hidden, targets in zip(hidden_TD.split(1024), batch.targets_T.split(1024), strict=True):
            nats += float(token_losses(hidden, model.head_PD, targets, model.spec.softcap).double().sum())
        tokens, size = tokens + batch.predicted, size + bytes_of(batch.targets_T, bytes_P)
        if limit is not None and tokens >= limit:
            break
    model.train(was_training)
    return HeldOut(nats, tokens, size)
