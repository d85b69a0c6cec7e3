"""Softmax attention as a sum of parts: each is a few query rows over a few keys, merged by log-sum-exp.

Whoever knows which queries meet which keys (chosen blocks, tiles of a static mask) cuts that into parts; here they are
computed, forward and backward, without ever holding more than one of them. Backward recomputes the probabilities of
each part from the merged output and log-sum-exp (spec sparse-attention 1.2, 1.3), so parts must be disjoint.

Exponentials are powers of two: on a CPU they cost a third.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sextant.kernels.attention.span import Scores

LOG2_E = math.log2(math.e)

SCORES_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}
"""Scores of a part: what a CPU likes best, and enough to fill a GPU."""


@dataclass(frozen=True)
class Part:
    """M products of T query rows with S keys; the rows of heads that share their keys ride together.

    Attributes:
        rows_MT: int64 ``query * H + head``; no row twice, ``T * H`` (one past the last) for none.
        keys_MS: int64 ``key * G + group``; what stands for no key is to be masked.
        visible_MTS: bool, broadcast over what it lacks; None when all is read.
    """

    rows_MT: Tensor
    keys_MS: Tensor
    visible_MTS: Tensor | None = None


Parts = Callable[[], Iterable[Part]]
"""The parts of one attention, made anew for each pass."""


@dataclass(frozen=True)
class Lanes:
    """The last T of S tokens, and heads that share what they read: a lane is a query head, or a KV group's heads."""

    tokens: int
    keys: int
    heads: int
    groups: int
    count: int

    @property
    def first(self) -> int:
        """Place of the first query."""
        return self.keys - self.tokens

    @property
    def share(self) -> int:
        """Heads of a lane."""
        return self.heads // self.count

    def rows(self, token_MT: Tensor, lane_M: Tensor) -> Tensor:
        """Rows of a :class:`Part` for tokens of lanes, negative for none: the heads of a token follow each other."""
        head_MH = lane_M[:, None] * self.share + torch.arange(self.share, device=lane_M.device)
        rows_MTH = token_MT[..., None] * self.heads + head_MH[:, None]
        return rows_MTH.masked_fill(token_MT[..., None] < 0, self.tokens * self.heads).flatten(1)

    def places(self, place_MS: Tensor, lane_M: Tensor) -> Tensor:
        """Keys of a :class:`Part`; a place outside the sequence, which is to be masked, stands at its nearest end."""
        return place_MS.clamp(0, self.keys - 1) * self.groups + (lane_M * self.groups // self.count)[:, None]


def attend_parts(
    q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, parts: Parts, scores: Scores
) -> tuple[Tensor, Tensor]:
    """Attention of the last T of S tokens, over the disjoint parts: ``o_THV`` in the dtype of ``v``, and ``lse_HT``.

    Softmax statistics are fp32, or fp64 for fp64. On a CPU half precision is widened part by part, so nothing is
    rounded in between; on a GPU its products have half-precision factors (probabilities too) and fp32 sums. A row
    without keys gives 0 and minus infinity. Gradients for q, k and v, from both results.
    """
    o_THV, lse_HT = cast(tuple[Tensor, Tensor], _Merged.apply(q_THK, k_SGK, v_SGV, parts, scores))
    return o_THV, lse_HT


@dataclass(frozen=True)
class _Operands:
    """Flat rows of one call: query row ``t * H + h``, key row ``s * G + g``."""

    q_NK: Tensor
    k_NK: Tensor
    v_NV: Tensor
    heads: int
    groups: int
    scores: Scores

    @classmethod
    def of(cls, q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, scores: Scores) -> _Operands:
        heads, groups = q_THK.shape[1], k_SGK.shape[1]
        q_NK, k_NK, v_NV = (x.reshape(-1, x.shape[2]) for x in (q_THK, k_SGK, v_SGV))
        return cls(q_NK, k_NK, v_NV, heads, groups, scores)

    @property
    def statistics(self) -> torch.dtype:
        return torch.promote_types(self.q_NK.dtype, torch.float32)

    @property
    def factors(self) -> torch.dtype:
        """Of the products: half precision only where a device multiplies it with fp32 sums."""
        return self.q_NK.dtype if self.q_NK.is_cuda else self.statistics

    def rows(self, x_NK: Tensor, index_MT: Tensor) -> Tensor:
        flat = index_MT.flatten().clamp_max(len(x_NK) - 1)
        return x_NK.index_select(0, flat).unflatten(0, index_MT.shape).to(self.factors)

    def logits(self, part: Part, q_MTK: Tensor, k_MSK: Tensor) -> Tensor:
        """Scores in fp32 by the base 2; minus infinity where nothing is to be seen."""
        logits_MTS = self.product(q_MTK, k_MSK.transpose(1, 2), LOG2_E * self.scores.scale)
        if self.scores.slopes_H is not None:
            logits_MTS -= LOG2_E * self._penalty(part, self.scores.slopes_H)
        if part.visible_MTS is not None:
            logits_MTS.masked_fill_(~part.visible_MTS, -math.inf)
        return logits_MTS

    def _penalty(self, part: Part, slopes_H: Tensor) -> Tensor:
        first = len(self.k_NK) // self.groups - len(self.q_NK) // self.heads
        places_MT, keys_MS = part.rows_MT // self.heads + first, part.keys_MS // self.groups
        distance_MTS = places_MT[..., None] - keys_MS[:, None]
        return slopes_H.to(self.statistics)[part.rows_MT % self.heads][..., None] * distance_MTS

    def product(self, a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
        """``factor * a @ b`` of batches, with sums and result in the dtype of the statistics."""
        if self.factors != self.statistics:
            y = torch.bmm(a.to(self.factors), b.to(self.factors), out_dtype=self.statistics)
            return y if factor == 1.0 else y.mul_(factor)
        y = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
        return y.baddbmm_(a, b, beta=0, alpha=factor)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, parts: Parts, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        operands = _Operands.of(q_THK, k_SGK, v_SGV, scores)
        count = len(operands.q_NK)
        like = {"device": q_THK.device, "dtype": operands.statistics}
        o_NV = torch.zeros(count + 1, v_SGV.shape[2], **like)
        lse_N = torch.full((count + 1,), -math.inf, **like)
        for part in parts():
            _merge(o_NV, lse_N, part.rows_MT.flatten(), *_forward(operands, part))
        o_THV = o_NV[:count].view(*q_THK.shape[:2], -1).to(v_SGV.dtype)
        lse_HT = lse_N[:count].view(q_THK.shape[:2]).t() / LOG2_E
        ctx.parts, ctx.scores = parts, scores
        ctx.save_for_backward(q_THK, k_SGK, v_SGV, o_THV, lse_HT)
        return o_THV, lse_HT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_THK, k_SGK, v_SGV, o_THV, lse_HT = ctx.saved_tensors
        operands = _Operands.of(q_THK, k_SGK, v_SGV, ctx.scores)
        merged = _Given.of(operands.statistics, o_THV, lse_HT, *grads)
        like = {"device": q_THK.device, "dtype": operands.statistics}
        dq_NK = torch.zeros(len(operands.q_NK) + 1, q_THK.shape[2], **like)
        dk_NK, dv_NV = torch.zeros(operands.k_NK.shape, **like), torch.zeros(operands.v_NV.shape, **like)
        for part in ctx.parts():
            dq_MTK, dk_MSK, dv_MSV = _backward(operands, part, merged)
            dq_NK.index_add_(0, part.rows_MT.flatten(), dq_MTK.flatten(0, 1))
            dk_NK.index_add_(0, part.keys_MS.flatten(), dk_MSK.flatten(0, 1))
            dv_NV.index_add_(0, part.keys_MS.flatten(), dv_MSV.flatten(0, 1))
        dq, dk, dv = (
            x.view(to.shape).to(to.dtype) for x, to in ((dq_NK[:-1], q_THK), (dk_NK, k_SGK), (dv_NV, v_SGV))
        )
        return dq, dk, dv, None, None


def _forward(operands: _Operands, part: Part) -> tuple[Tensor, Tensor]:
    """Output and base-2 log-sum-exp of one part, both flat over its rows."""
    q_MTK = operands.rows(operands.q_NK, part.rows_MT)
    k_MSK, v_MSV = (operands.rows(x, part.keys_MS) for x in (operands.k_NK, operands.v_NV))
    logits_MTS = operands.logits(part, q_MTK, k_MSK)
    peak_MT1 = logits_MTS.amax(-1, keepdim=True)
    peak_MT1.masked_fill_(peak_MT1 == -math.inf, 0.0)
    weights_MTS = logits_MTS.sub_(peak_MT1).exp2_()
    total_MT1 = weights_MTS.sum(-1, keepdim=True)
    o_MTV = operands.product(weights_MTS, v_MSV).div_(total_MT1.clamp_min(torch.finfo(total_MT1.dtype).tiny))
    return o_MTV.flatten(0, 1), (peak_MT1 + total_MT1.log2()).flatten()


def _merge(o_NV: Tensor, lse_N: Tensor, rows_T: Tensor, o_TV: Tensor, lse_T: Tensor) -> None:
    """Add a part to the rows that it has, in place."""
    before_T = lse_N.index_select(0, rows_T)
    after_T = torch.logaddexp2(before_T, lse_T)
    safe_T = after_T.masked_fill(after_T == -math.inf, 0.0)
    o_TV.mul_((lse_T - safe_T).exp2_()[:, None])
    o_TV.addcmul_(o_NV.index_select(0, rows_T), (before_T - safe_T).exp2_()[:, None])
    o_NV.index_copy_(0, rows_T, o_TV)
    lse_N.index_copy_(0, rows_T, after_T)


@dataclass(frozen=True)
class _Given:
    """What backward knows of each query row, with one row more that stands for none and has no gradient."""

    do_NV: Tensor
    lse_N: Tensor
    delta_N: Tensor

    @classmethod
    def of(cls, dtype: torch.dtype, o_THV: Tensor, lse_HT: Tensor, do_THV: Tensor, dlse_HT: Tensor) -> _Given:
        """``delta = do . o - dlse``; rows without keys get an infinite log-sum-exp, so that nothing comes of them."""
        delta_TH = (do_THV.to(dtype) * o_THV.to(dtype)).sum(-1) - dlse_HT.t()
        lse_N = torch.cat([lse_HT.t().flatten() * LOG2_E, lse_HT.new_full((1,), math.inf)])
        do_NV = torch.cat([do_THV.flatten(0, 1), do_THV.new_zeros(1, do_THV.shape[2])])
        delta_N = torch.cat([delta_TH.flatten(), delta_TH.new_zeros(1)])
        return cls(do_NV, lse_N.masked_fill_(lse_N == -math.inf, math.inf), delta_N)


def _backward(operands: _Operands, part: Part, given: _Given) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one part for its own rows of q, k and v."""
    rows_N, shape = part.rows_MT.flatten(), (*part.rows_MT.shape, 1)
    q_MTK = operands.rows(operands.q_NK, part.rows_MT)
    do_MTV = operands.rows(given.do_NV, part.rows_MT)
    k_MSK, v_MSV = (operands.rows(x, part.keys_MS) for x in (operands.k_NK, operands.v_NV))
    lse_MT1, delta_MT1 = (x.index_select(0, rows_N).view(shape) for x in (given.lse_N, given.delta_N))
    weights_MTS = operands.logits(part, q_MTK, k_MSK).sub_(lse_MT1).exp2_()
    dv_MSV = operands.product(weights_MTS.transpose(1, 2), do_MTV)
    dlogits_MTS = operands.product(do_MTV, v_MSV.transpose(1, 2)).sub_(delta_MT1).mul_(weights_MTS)
    scale = operands.scores.scale
    return (
        operands.product(dlogits_MTS, k_MSK, scale),
        operands.product(dlogits_MTS.transpose(1, 2), q_MTK, scale),
        dv_MSV,
    )
