"""Linear attention with decay: ``S_t = diag(decay_t) S_{t-1} + k_t v_t^T``, ``o_t = q_t S_t``.

One machinery for a fixed decay per head (lightning, RetNet), one per token, and one per token and key channel (GLA).
``reference.py`` is the definition, ``chunked.py`` the form with work linear in T. The delta rule, which corrects the
state instead of adding to it, is ``delta.py`` beside them.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sextant.kernels.linear.chunked import chunked
from sextant.kernels.linear.recompute import recomputed
from sextant.kernels.linear.reference import parallel, recurrent

__all__ = ["chunked", "linear_attention", "parallel", "recurrent"]


def linear_attention(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_decay: Tensor, state_BHKV: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Decayed linear attention of B sequences of one length, after what a state holds of them.

    Computed in fp32 whatever comes in (fp64 for fp64). In training only the inputs are kept: the backward computes the
    chunks again.

    Args:
        log_decay: at most 0; ``[H]`` for a fixed decay of each head, else ``[B, T, H, 1 or K]``.
        state_BHKV: true state after the tokens so far; None is zero.
        chunk: tokens whose scores are formed at once; changes the speed alone.

    Returns:
        ``o_BTHV`` and the state after the last token, both in fp32 or fp64.
    """
    log = log_decay[None, :, None, None] if log_decay.dim() == 1 else log_decay.transpose(1, 2)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHV))
    o_BHTV, after_BHKV = recomputed(partial(_precisely, chunk), q, k, v, log, state_BHKV)
    return o_BHTV.transpose(1, 2), after_BHKV


def _precisely(
    chunk: int, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, log_decay: Tensor, state_BHKV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """At least fp32, from a state; one token is the recurrence itself."""
    dtype = torch.promote_types(v_BHTV.dtype, torch.float32)
    q, k, v, log = (x.to(dtype) for x in (q_BHTK, k_BHTK, v_BHTV, log_decay))
    if state_BHKV is None:
        state_BHKV = v.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    if q.shape[2] == 1:
        return recurrent(q, k, v, log, state_BHKV)
    return chunked(q, k, v, log, state_BHKV, chunk)
