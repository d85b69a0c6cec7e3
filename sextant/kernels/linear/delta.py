"""The gated delta rule: a state that decays, and then corrects what it answers to a key (2412.06464; 2406.06484).

``S_t = (I - beta_t k_t k_t^T) diag(a_t) S_{t-1} + beta_t k_t v_t^T``, ``o_t = q_t S_t``: a first loses what the decay
takes, then the part that it holds under ``k_t`` moves towards ``v_t`` by the share ``beta_t``. One decay per head makes
Gated DeltaNet, one per key channel KDA (Kimi Linear; spec minimax-01, section 16).

In chunks the corrections ``u_t = beta_t (v_t - k_t diag(a_t) S_{t-1})`` depend on each other through a unit lower
triangular system, whose solution has a part for the chunk's own tokens and one that is linear in the state before it
(the UT transform). Decays enter only as ``exp`` of differences that are at most 0, which must be finite.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sextant.kernels.linear.chunked import running_decay
from sextant.kernels.linear.recompute import recomputed


def delta_rule(
    q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, log_decay: Tensor, beta_BTH: Tensor,
    state_BHKV: Tensor | None = None, chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The delta rule over B sequences of one length, after what a state holds of them.

    Computed in fp32 whatever comes in (fp64 for fp64). In training only the inputs are kept: the backward computes the
    chunks again.

    Args:
        q_BTGK: each of the G heads of queries and keys serves H / G consecutive heads of values.
        k_BTGK: of length at most 1, or the state may grow without bound.
        log_decay: at most 0, ``[B, T, H, 1 or K]``.
        beta_BTH: 0 writes nothing, 1 replaces what the state holds under the key.
        state_BHKV: state after the tokens so far; None is zero.
        chunk: tokens whose corrections are solved for at once; changes the speed alone.

    Returns:
        ``o_BTHV`` and the state after the last token, both in fp32 or fp64.
    """
    rows = (x.transpose(1, 2) for x in (q_BTGK, k_BTGK, v_BTHV, log_decay, beta_BTH))
    o_BHTV, after_BHKV = recomputed(partial(_precisely, chunk), *rows, state_BHKV)
    return o_BHTV.transpose(1, 2), after_BHKV


def _precisely(
    chunk: int, q_BGTK: Tensor, k_BGTK: Tensor, v_BHTV: Tensor, log_decay: Tensor, beta_BHT: Tensor,
    state_BHKV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """At least fp32, from a state, all heads alike; one token is the recurrence itself."""
    dtype = torch.promote_types(v_BHTV.dtype, torch.float32)
    q, k, v, log, beta = (x.to(dtype) for x in (q_BGTK, k_BGTK, v_BHTV, log_decay, beta_BHT))
    q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], dim=1) for x in (q, k))
    if state_BHKV is None:
        state_BHKV = v.new_zeros(*v.shape[:2], q.shape[-1], v.shape[-1])
    if q.shape[2] == 1:
        return recurrent_delta(q, k, v, log, beta, state_BHKV)
    return chunked_delta(q, k, v, log, beta, state_BHKV, chunk)


def recurrent_delta(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, log_decay: Tensor, beta_BHT: Tensor, state_BHKV: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, token by token: the truth for the chunked form, forward and by autograd backward.

    Args:
        log_decay: at most 0, ``[B, H, T, 1 or K]``.

    Returns:
        ``o_BHTV`` and the state after the last token.
    """
    decay, rows = log_decay.exp(), []
    for t in range(q_BHTK.shape[2]):
        state_BHKV = decay[:, :, t, :, None] * state_BHKV
        held_BHV = (k_BHTK[:, :, t, None] @ state_BHKV)[:, :, 0]
        correction_BHV = beta_BHT[:, :, t, None] * (v_BHTV[:, :, t] - held_BHV)
        state_BHKV = state_BHKV + k_BHTK[:, :, t, :, None] * correction_BHV[:, :, None]
        rows.append(q_BHTK[:, :, t, None] @ state_BHKV)
    return torch.cat(rows, dim=2) if rows else v_BHTV[:, :, :0], state_BHKV


def chunked_delta(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, log_decay: Tensor, beta_BHT: Tensor, state_BHKV: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """:func:`recurrent_delta` by chunks; the result does not depend on ``chunk``, and nothing is padded."""
    tokens = q_BHTK.shape[2]
    whole, outputs = tokens // chunk * chunk, []
    for start, stop, size in ((0, whole, chunk), (whole, tokens, tokens - whole)):
        if start < stop:
            rows = (x[:, :, start:stop] for x in (q_BHTK, k_BHTK, v_BHTV, log_decay, beta_BHT))
            o_BHTV, state_BHKV = _chunks(size, state_BHKV, *rows)
            outputs.append(o_BHTV)
    return torch.cat(outputs, dim=2) if outputs else v_BHTV[:, :, :0], state_BHKV


def _chunks(
    size: int, state_BHKV: Tensor, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, log_decay: Tensor, beta_BHT: Tensor
) -> tuple[Tensor, Tensor]:
    """Whole chunks of ``size`` tokens: all that needs no state for every chunk at once, then the state through them."""
    q, k, v, beta = (x.unflatten(2, (-1, size)) for x in (q_BHTK, k_BHTK, v_BHTV, beta_BHT[..., None]))
    b = running_decay(log_decay, size)
    end, since = b[..., -1:, :], b.exp()
    reads_BHMTS, overlaps_BHMTS = _scores(q, k, b)
    # Only what lies strictly below the diagonal is read of the system.
    solved = torch.linalg.solve_triangular(
        beta * overlaps_BHMTS, beta * torch.cat((v, k * since), -1), upper=False, unitriangular=True
    )
    own_BHMTV, held_BHMTK = solved.split((v.shape[-1], k.shape[-1]), dim=-1)
    keys_BHMKT = (k * (end - b).exp()).transpose(-1, -2)
    decay = end.exp().transpose(-1, -2)
    before_BHMKV, u_BHMTV, state_BHKV = _carry(decay, keys_BHMKT, own_BHMTV, held_BHMTK, state_BHKV)
    o_BHMTV = (q * since) @ before_BHMKV + reads_BHMTS @ u_BHMTV
    return o_BHMTV.flatten(2, 3), state_BHKV


def _carry(
    decay: Tensor, keys_BHMKT: Tensor, own_BHMTV: Tensor, held_BHMTK: Tensor, state_BHKV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """From chunk to chunk: the state before each, its corrections ``u = own - held S``, and the last state."""
    before, corrections = [], []
    chunks = zip(*(x.unbind(2) for x in (decay, keys_BHMKT, own_BHMTV, held_BHMTK)), strict=True)
    for decay_now, keys, own, held in chunks:
        before.append(state_BHKV)
        corrections.append(own - held @ state_BHKV)
        state_BHKV = torch.addcmul(keys @ corrections[-1], decay_now, state_BHKV)
    return torch.stack(before, dim=2), torch.stack(corrections, dim=2), state_BHKV


def _scores(q_BHMTK: Tensor, k_BHMTK: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``x_t . exp(b_t - b_s) k_s`` for s up to t, else 0, with x the queries and with x the keys: ``[..., T, S]``."""
    x = torch.stack((q_BHMTK, k_BHMTK))
    if b.shape[-1] > 1:
        reads, overlaps = _by_halves(x, k_BHMTK, b)
        return reads, overlaps
    size = b.shape[-2]
    after_TS = torch.ones(size, size, dtype=torch.bool, device=b.device).triu(1)
    weight = (b - b.transpose(-1, -2)).masked_fill(after_TS, -torch.inf).exp()
    reads, overlaps = x @ k_BHMTK.transpose(-1, -2) * weight
    return reads, overlaps


def _by_halves(x: Tensor, k: Tensor, b: Tensor) -> Tensor:
    """A decay for each channel: the second half of a span meets the first through the decays up to and from the end of
    the first, both at most 1, which may be multiplied to x and to k; then each half in the same way, down to one token.
    """
    size = k.shape[-2]
    if size == 1:
        return torch.linalg.vecdot(x, k)[..., None]
    if size % 2:
        x, k, b = F.pad(x, (0, 0, 0, 1)), F.pad(k, (0, 0, 0, 1)), torch.cat((b, b[..., -1:, :]), dim=-2)
        return _by_halves(x, k, b)[..., :size, :size]
    x, k, b = (rows.unflatten(-2, (2, size // 2)) for rows in (x, k, b))
    first_b, second_b = b.unbind(-3)
    middle = first_b[..., -1:, :]
    keys = k[..., 0, :, :] * (middle - first_b).exp()
    across = x[..., 1, :, :] * (second_b - middle).exp() @ keys.transpose(-1, -2)
    first, second = _by_halves(x, k, b).unbind(-3)
    upper, lower = torch.cat((first, torch.zeros_like(across)), -1), torch.cat((across, second), -1)
    return torch.cat((upper, lower), dim=-2)
