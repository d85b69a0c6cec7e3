"""Multi-token prediction: modules in a row, each of which sees one token further than the one before (2412.19437, 2.2).

Module ``k`` (from 1) joins the row of token ``i`` with the embedding of token ``i + k`` of the same sequence, runs one
block of its own over them and predicts token ``i + k + 1`` by the model's own embedding and head. It trains the model,
and drafts for speculative decoding; the model without it is the same model. Spec deepseek-v3, section 3.

It stands here, not on axis 3: it adds no capacity to the model that is served, and it holds a whole layer.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sextant.axes.numerics import Numerics
from sextant.axes.stability import AnyNorm, Linear, Role
from sextant.core.cost import At, Cost
from sextant.core.spec import Spec
from sextant.core.stream import Stream
from sextant.model.block import Block
from sextant.model.layer import Layer


class LossWeight(Spec):
    """Lambda: ``first`` until the share ``until`` of a run's steps is done, then ``later``.

    V3: 0.3 for 10 of 14.8 T tokens, then 0.1 (spec deepseek-v3, 8.1). A run that grows its batch sees fewer tokens in
    its early steps, so its share of steps is the larger one.
    """

    first: float = Field(default=0.3, ge=0)
    later: float = Field(default=0.1, ge=0)
    until: float = Field(default=0.7, ge=0, le=1)

    def at(self, step: int, steps: int) -> float:
        """For optimiser step ``step`` (from 0) of ``steps``."""
        return self.first if step < round(self.until * steps) else self.later


class MTP(Spec):
    """``depth`` modules in a row.

    Attributes:
        layer: of each module; None is the model's last one.
        order: what stands first in the row that enters: the paper prints ``hidden_first``, the released weights are
            ``embedding_first``. Trained from scratch it makes no difference.
        hidden: which row of the model, or of the module before, enters: after its last norm or before.
        weight: lambda, which the losses of all modules share equally.
    """

    depth: int = Field(default=1, ge=1, le=64)
    layer: Layer | None = None
    order: Literal["embedding_first", "hidden_first"] = "embedding_first"
    hidden: Literal["post_norm", "pre_norm"] = "post_norm"
    weight: LossWeight = LossWeight()

    def cost(self, layer: Layer, norm: AnyNorm, width: int, at: At) -> Cost:
        """Of one module, less the head's second product."""
        return 3 * norm.cost(width, at) + Cost.of_matrix(2 * width, width, at) + layer.cost(width, at)


class MTPModule(nn.Module):
    """What one module owns; the model runs ``block`` between :meth:`enter` and ``norm``.

    Its decoding state is a memory of its own, because it is fed other rows than the model, at other times.
    """

    def __init__(self, spec: MTP, layer: Layer, norm: AnyNorm, width: int, numerics: Numerics):
        super().__init__()
        self.spec, self.numerics = spec, numerics
        self.embedding_norm = norm.build(width)
        self.hidden_norm = norm.build(width)
        self.project = Linear(2 * width, width, Role.FF_IN)
        self.block = Block(layer, width, numerics, index=0)
        self.norm = norm.build(width)

    def enter(self, rows_TD: Tensor, embedded_TD: Tensor) -> Tensor:
        """The residual stream's rows ``[T, D]``, from those of the model and of the next tokens."""
        pair = [self.embedding_norm(embedded_TD), self.hidden_norm(rows_TD)]
        if self.spec.order == "hidden_first":
            pair.reverse()
        return self.project(self.numerics.lower(torch.cat(pair, dim=-1))).to(embedded_TD.dtype)


def without_last(stream: Stream) -> tuple[Stream, Tensor]:
    """The rows of a training stream whose next token lies in the same sequence; a sequence of one token or none goes.

    Returns:
        The stream of these rows, at the positions they had, and their numbers ``rows_T`` in the whole one.
    """
    index_T = torch.arange(stream.positions_T.numel(), device=stream.positions_T.device)
    if stream.rows:
        length = stream.positions_T.numel() // stream.rows
        rows_T, lengths = index_T.view(stream.rows, length)[:, :-1].flatten(), [length - 1] * stream.rows
    else:
        ends_B = stream.cu_seqlens[1:][stream.cu_seqlens.diff() > 0].long() - 1
        rows_T = index_T[torch.ones_like(index_T, dtype=torch.bool).index_fill_(0, ends_B, False)]
        lengths = [length - 1 for length in stream.lengths]
    return _cut(stream, rows_T, [length for length in lengths if length > 0]), rows_T


def _cut(stream: Stream, rows_T: Tensor, lengths: list[int]) -> Stream:
    """These rows of a stream, as sequences of these lengths, at the positions they have."""
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=rows_T.device)
    rows = len(lengths) if len(set(lengths)) == 1 else None
    cut = Stream(stream.positions_T[rows_T], cu_seqlens, max(0, stream.max_len - 1), rows)
    cut.__dict__["lengths"] = lengths
    return cut
