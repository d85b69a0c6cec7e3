"""Attention of the last tokens of one sequence over the window before each of them."""

from __future__ import annotations

import torch
from torch import Tensor

from sextant.core.state import Keys
from sextant.core.stream import Stream
from sextant.kernels.attention import attend
from sextant.kernels.attention.span import Scores, Span


def attend_last(q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, window: int | None, scores: Scores) -> Tensor:
    """``o_THV`` of the queries of the last T tokens over the last ``window`` keys of each (None: all).

    The keys may begin anywhere before the first query's window, so those of a ring will do; older ones are not touched.
    """
    tokens, device = len(q_THK), q_THK.device
    if tokens == len(k_SGK):
        return attend(q_THK, Keys(k_SGK, v_SGV), Stream.of_lengths([tokens], device), Span(window), scores)
    near = slice(-(window + tokens - 1) if window else None, None)
    k_BGSK, v_BGSV = (rows[near].transpose(0, 1)[None] for rows in (k_SGK, v_SGV))
    position_S = torch.arange(k_BGSK.shape[2], device=device)
    stream = Stream(position_S[-tokens:], position_S.new_tensor([0, tokens], dtype=torch.int32), tokens, rows=1)
    keys = Keys(k_BGSK, v_BGSV, position_S[None], exact=tokens == 1)
    return attend(q_THK, keys, stream, Span(window), scores)
