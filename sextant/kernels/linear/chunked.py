"""Linear attention with decay in chunks: products inside, one state between; work and memory linear in T.

Tokens of a chunk read each other through masked scores, and all that came before through the state at the chunk's
start. Decays enter only as ``exp`` of differences that are at most 0: a sum of log decays is never pulled apart into
``exp(b_t) exp(-b_s)``, whose second factor overflows (spec minimax-01, 3.3; 2312.06635, section 4.3).

Chunks are the axis M; T are the query tokens of a chunk and S its key tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def chunked(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, log_decay: Tensor, state_BHKV: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """:func:`~sextant.kernels.linear.reference.recurrent` by chunks; the result does not depend on ``chunk``.

    The last tokens that fill no chunk are a chunk of their own, so nothing is padded and nothing decays too far.
    """
    tokens = q_BHTK.shape[2]
    whole, outputs = tokens // chunk * chunk, []
    for start, stop, size in ((0, whole, chunk), (whole, tokens, tokens - whole)):
        if start < stop:
            here = slice(start, stop)
            log = log_decay if log_decay.shape[2] == 1 else log_decay[:, :, here]
            rows = (q_BHTK[:, :, here], k_BHTK[:, :, here], v_BHTV[:, :, here])
            o_BHTV, state_BHKV = _chunks(*rows, log, state_BHKV, size)
            outputs.append(o_BHTV)
    return torch.cat(outputs, dim=2) if outputs else v_BHTV[:, :, :0], state_BHKV


def _chunks(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, log_decay: Tensor, state_BHKV: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Whole chunks of ``size`` tokens."""
    q, k, v = (x.unflatten(2, (-1, size)) for x in (q_BHTK, k_BHTK, v_BHTV))
    b = running_decay(log_decay, size)
    end = b[..., -1:, :]
    new_BHMKV = (k * (end - b).exp()).transpose(-1, -2) @ v
    before_BHMKV, state_BHKV = carry(end.exp().transpose(-1, -2), new_BHMKV, state_BHKV)
    inside = _by_scores(q, k, v, b) if b.shape[-1] == 1 else _by_halves(q, k, v, b)
    return (inside + (q * b.exp()) @ before_BHMKV).flatten(2, 3), state_BHKV


def running_decay(log_decay: Tensor, size: int) -> Tensor:
    """Sums of log decays from each chunk's start, ``[B, H, M, T, 1 or K]``; one chunk stands for all when the decay is
    the same for every token.
    """
    if log_decay.shape[2] == 1:
        steps_T1 = torch.arange(1, size + 1, dtype=log_decay.dtype, device=log_decay.device)[:, None]
        return log_decay[:, :, None] * steps_T1
    return log_decay.unflatten(2, (-1, size)).cumsum(3)


def carry(decay: Tensor, new_BHMKV: Tensor, state_BHKV: Tensor) -> tuple[Tensor, Tensor]:
    """``S <- decay_m S + new_m`` from chunk to chunk: the state before each chunk, ``[B, H, M, K, V]``, and the last.

    Args:
        decay: of a whole chunk, ``[1 or B, H, 1 or M, 1 or K, 1]``.
    """
    before, decays = [], decay.expand(-1, -1, new_BHMKV.shape[2], -1, -1).unbind(2)
    for decay_now, new in zip(decays, new_BHMKV.unbind(2), strict=True):
        before.append(state_BHKV)
        state_BHKV = torch.addcmul(new, decay_now, state_BHKV)
    return torch.stack(before, dim=2), state_BHKV


def _by_scores(q_BHMTK: Tensor, k_BHMSK: Tensor, v_BHMSV: Tensor, b: Tensor) -> Tensor:
    """One decay for all channels of a head: a mask of decays on the scores."""
    size = q_BHMTK.shape[3]
    after_TS = torch.ones(size, size, dtype=torch.bool, device=b.device).triu(1)
    weight = (b - b.transpose(-1, -2)).masked_fill(after_TS, -torch.inf).exp()
    return (q_BHMTK @ k_BHMSK.transpose(-1, -2) * weight) @ v_BHMSV


def _by_halves(q_BHMTK: Tensor, k_BHMSK: Tensor, v_BHMSV: Tensor, b: Tensor) -> Tensor:
    """A decay for each channel: the second half of a span reads the first through the decays up to and from the end of
    the first, both at most 1, which may be multiplied to q and to k; then each half in the same way, down to one token.
    """
    size = q_BHMTK.shape[3]
    if size == 1:
        return torch.linalg.vecdot(q_BHMTK, k_BHMSK)[..., None] * v_BHMSV
    if size % 2:
        q, k, v = (F.pad(x, (0, 0, 0, 1)) for x in (q_BHMTK, k_BHMSK, v_BHMSV))
        return _by_halves(q, k, v, torch.cat((b, b[..., -1:, :]), dim=3))[..., :size, :]
    q, k, v, sums = (x.unflatten(3, (2, size // 2)) for x in (q_BHMTK, k_BHMSK, v_BHMSV, b))
    middle = sums[..., 0, -1:, :]
    queries = q[..., 1, :, :] * (sums[..., 1, :, :] - middle).exp()
    keys = k[..., 0, :, :] * (middle - sums[..., 0, :, :]).exp()
    across = (queries @ keys.transpose(-1, -2)) @ v[..., 0, :, :]
    within = _by_halves(*(x.flatten(2, 3) for x in (q, k, v, sums))).unflatten(2, (-1, 2))
    return torch.stack((within[..., 0, :, :], within[..., 1, :, :] + across), dim=3).flatten(3, 4)
