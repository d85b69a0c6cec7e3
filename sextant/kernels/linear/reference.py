"""Linear attention with decay by definition: all pairs of tokens under a mask of decays, and one token after another.

Both are the truth for the chunked form, forward and by autograd backward. The state is the true one: it holds the last
token with weight 1 and is not yet decayed for the next (spec minimax-01, sections 3.3 and 3.4).
"""

from __future__ import annotations

import torch
from torch import Tensor


def recurrent(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, log_decay: Tensor, state_BHKV: Tensor
) -> tuple[Tensor, Tensor]:
    """``S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T``, ``o_t = q_t S_t``, token by token.

    Args:
        log_decay: at most 0; ``[1 or B, H, 1 or T, 1 or K]``: one for each head, token or key channel.

    Returns:
        ``o_BHTV`` and the state after the last token.
    """
    decay, rows = log_decay.exp().expand(-1, -1, q_BHTK.shape[2], -1), []
    for t in range(q_BHTK.shape[2]):
        new_BHKV = k_BHTK[:, :, t, :, None] * v_BHTV[:, :, t, None, :]
        state_BHKV = decay[:, :, t, :, None] * state_BHKV + new_BHKV
        rows.append(q_BHTK[:, :, t, None, :] @ state_BHKV)
    return torch.cat(rows, dim=2) if rows else v_BHTV[:, :, :0], state_BHKV


def parallel(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, log_decay: Tensor, state_BHKV: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`recurrent` in one step: ``o_t = sum_s (q_t . exp(b_t - b_s) k_s) v_s + (q_t exp(b_t)) S`` over s up to t,
    with ``b`` the running sum of ``log_decay``; work and memory T^2 K.
    """
    tokens = q_BHTK.shape[2]
    b = log_decay.expand(-1, -1, tokens, -1).cumsum(2)
    after = torch.ones(tokens, tokens, dtype=torch.bool, device=b.device).triu(1)[..., None]
    weight = (b[:, :, :, None] - b[:, :, None]).masked_fill(after, -torch.inf).exp()
    scores_BHTS = (q_BHTK[:, :, :, None] * weight * k_BHTK[:, :, None]).sum(-1)
    o_BHTV = scores_BHTS @ v_BHTV + (q_BHTK * b.exp()) @ state_BHKV
    left, decay = (b[:, :, -1:] - b).exp(), b[:, :, -1, :, None].exp()
    return o_BHTV, decay * state_BHKV + (k_BHTK * left).transpose(-1, -2) @ v_BHTV
