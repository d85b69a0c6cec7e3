"""Masked softmax attention, written to be believed: the truth for every faster path, forward and backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sextant.kernels.attention.span import Scores, Span


def attend_dense(
    q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, mask_TS: Tensor, scores: Scores, distance_TS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one sequence over the keys that ``mask_TS`` allows.

    ``distance_TS`` (query position minus key position) is needed for ALiBi. A query that sees nothing gives 0 and a
    log-sum-exp of minus infinity. Works in fp32, or in fp64 when given fp64.

    Returns:
        ``o_THV`` in the dtype of ``v`` and ``lse_HT``.
    """
    group = q_THK.shape[1] // k_SGK.shape[1]
    dtype = torch.promote_types(q_THK.dtype, torch.float32)
    k_SHK = k_SGK.to(dtype).repeat_interleave(group, dim=1)
    v_SHV = v_SGV.to(dtype).repeat_interleave(group, dim=1)
    scores_HTS = torch.einsum("thk,shk->hts", q_THK.to(dtype), k_SHK) * scores.scale
    if scores.slopes_H is not None and distance_TS is not None:
        scores_HTS = scores_HTS - scores.slopes_H.to(dtype)[:, None, None] * distance_TS
    scores_HTS = scores_HTS.masked_fill(~mask_TS, -math.inf)
    lse_HT = torch.logsumexp(scores_HTS, dim=-1)
    weights_HTS = torch.exp(scores_HTS - lse_HT.masked_fill(lse_HT == -math.inf, 0.0)[..., None])
    return torch.einsum("hts,shv->thv", weights_HTS, v_SHV).to(v_SGV.dtype), lse_HT


def attend_ragged(
    q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, lengths: list[int], span: Span, scores: Scores
) -> Tensor:
    """Self-attention of sequences that lie end to end, one dense call each: ``o_THV``."""
    outputs = []
    for q, k, v in zip(q_THK.split(lengths), k_SGK.split(lengths), v_SGV.split(lengths), strict=True):
        position = torch.arange(len(q), device=q.device)
        distance_TS = position[:, None] - position
        outputs.append(attend_dense(q, k, v, span.visible(position, position), scores, distance_TS)[0])
    return torch.cat(outputs)
