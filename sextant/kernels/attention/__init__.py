"""Attention over a static span, by the fastest path that this device, dtype and layout allow.

* ragged training streams: runs of equal lengths go through scaled-dot-product attention together; long windows are cut
  into blocks, so that work and memory grow with the window; on a GPU in half precision, the variable-length kernel.
* a reach that is a plain span over regrouped tokens (a dilated window, blocks) is computed as that; any other one under
  a mask of tiles.
* decoding states: the queries of one KV head become rows of one product, so grouped heads read their keys once.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sextant.core.state import Keys
from sextant.core.stream import Stream
from sextant.kernels import matmul
from sextant.kernels.attention.reference import attend_dense, attend_ragged
from sextant.kernels.attention.span import Fold, Reach, Scores, Span, Tiled
from sextant.kernels.attention.tiles import attend_tiles

__all__ = ["Reach", "Scores", "Span", "attend", "attend_dense", "attend_ragged", "attend_with_lse"]


def attend(q_THK: Tensor, keys: Keys, stream: Stream, span: Reach, scores: Scores) -> Tensor:
    """Causal attention of every query of the stream over the keys of its own sequence: ``o_THV``."""
    if keys.positions is not None:
        return _from_state(q_THK, keys, stream, span, scores)
    if not isinstance(span, Span) or not span.plain:
        return _regrouped(q_THK, keys, stream, span, scores)
    if q_THK.is_cuda and q_THK.dtype in (torch.bfloat16, torch.float16) and not span.sinks and scores.slopes_H is None:
        return _on_gpu(q_THK, keys, stream, span, scores)
    pieces, at = [], 0
    for rows, length in stream.runs:
        if not length:
            continue
        here = slice(at, at + rows * length)
        q, k, v = (x[here].unflatten(0, (rows, length)).transpose(1, 2) for x in (q_THK, keys.k, keys.v))
        pieces.append(_causal(q, k, v, span, scores).transpose(1, 2).flatten(0, 1))
        at = here.stop
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else keys.v.new_empty(0, *q_THK.shape[1:])


def attend_with_lse(
    q_THK: Tensor, keys: Keys, stream: Stream, span: Reach, scores: Scores
) -> tuple[Tensor, Tensor]:
    """:func:`attend` one sequence at a time, with the log-sum-exp of each query's scores: ``o_THV`` and ``lse_HT``."""
    parts: list[tuple[Tensor, Tensor]] = []
    at = 0
    for b, length in enumerate(stream.lengths):
        here, at = slice(at, at + length), at + length
        if not length:
            continue
        if keys.positions is None:
            parts.append(attend_tiles(q_THK[here], keys.k[here], keys.v[here], Tiled(span), scores, span.tile))
            continue
        q_T, k_S = stream.positions_T[here], keys.positions[b]
        k_SGK, v_SGV = keys.k[b].transpose(0, 1), keys.v[b].transpose(0, 1)
        mask_TS = span.visible(q_T, k_S)
        parts.append(attend_dense(q_THK[here], k_SGK, v_SGV, mask_TS, scores, q_T[:, None] - k_S))
    if not parts:
        return keys.v.new_empty(0, q_THK.shape[1], keys.v.shape[-1]), keys.v.new_empty(q_THK.shape[1], 0)
    outputs, sums = zip(*parts, strict=True)
    return torch.cat(outputs), torch.cat(sums, dim=1)


def _regrouped(q_THK: Tensor, keys: Keys, stream: Stream, span: Reach, scores: Scores) -> Tensor:
    """Each sequence as several under a plain span where the reach can be folded so, else under its mask."""
    if not len(q_THK) or span.fold(1) is None:
        return attend_with_lse(q_THK, keys, stream, span, scores)[0]
    order_T, back_T, parts, inner, stretch = _order(span, tuple(stream.lengths), q_THK.device)
    slopes_H = None if scores.slopes_H is None else scores.slopes_H * stretch
    q, k, v = (x.index_select(0, order_T) for x in (q_THK, keys.k, keys.v))
    return attend(q, Keys(k, v), parts, inner, Scores(scores.scale, slopes_H)).index_select(0, back_T)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _order(
    span: Reach, lengths: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, Stream, Span, int]:
    """Where each row of the regrouped stream comes from, where it goes back to, that stream, its span and stretch."""
    folds = {length: _fold(span, length) for length in {1, *lengths} if length}
    starts = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
    order_T = torch.cat([folds[n].order_T + start for start, n in zip(starts, lengths, strict=True) if n])
    parts = Stream.of_lengths([part for n in lengths if n for part in folds[n].lengths], device)
    return order_T.to(device), order_T.argsort().to(device), parts, folds[1].span, folds[1].stretch


def _fold(span: Reach, length: int) -> Fold:
    fold = span.fold(length)
    if fold is None:
        raise ValueError(f"{span} folds some lengths and not {length}")
    return fold


def _causal(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, span: Span, scores: Scores) -> Tensor:
    """Self-attention of a batch of equally long sequences."""
    length, window = q_BHTK.shape[2], span.window
    if scores.slopes_H is None and (window is None or window >= length):
        return _sdpa(q_BHTK, k_BGTK, v_BGTV, scores.scale, causal=True)
    if window is not None and length >= 2 * window and not span.sinks and scores.slopes_H is None:
        return _blocked(q_BHTK, k_BGTK, v_BGTV, window, scores.scale)
    bias = _bias(length, span, scores, q_BHTK)
    return _sdpa(q_BHTK, k_BGTK, v_BGTV, scores.scale, bias)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None, causal: bool = False) -> Tensor:
    if bias is not None and bias.dtype not in (torch.bool, q.dtype) and q.is_cuda:
        # Fused GPU kernels misread a bias of another dtype (NaN), and a rounded one would not be fp32 scores.
        return _sdpa(q.to(bias.dtype), k.to(bias.dtype), v.to(bias.dtype), scale, bias).to(q.dtype)
    if matmul.is_slow(q) and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _WideGradient.apply(q, k, v, scale, bias, causal)  # type: ignore[return-value]
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, scale=scale, enable_gqa=grouped)


class _WideGradient(torch.autograd.Function):
    """Attention whose gradient is formed in fp32, from scores formed again there: nothing wide is kept.

    For a CPU without half-precision products: forward is as fast as in fp32 even so, backward five times slower.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, causal: bool
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, bias)
        ctx.scale, ctx.causal = scale, causal
        return _sdpa(q, k, v, scale, bias, causal)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *rows, bias = ctx.saved_tensors
        with torch.enable_grad():
            wide = [x.detach().float().requires_grad_() for x in rows]
            q, k, v = wide
            o = _sdpa(q, k, v, ctx.scale, bias, ctx.causal)
        return *(x.to(rows[0].dtype) for x in torch.autograd.grad(o, wide, grads[0].float())), None, None, None


def _bias(length: int, span: Span, scores: Scores, like: Tensor) -> Tensor:
    """What is added to the scores: 0 or minus infinity, and ALiBi's slopes, ``[1, 1 or H, T, S]``."""
    position_1T = torch.arange(length, device=like.device)[None]
    return _bias_at(position_1T, position_1T, span, scores, like)


def _bias_at(q_T: Tensor, k_S: Tensor, span: Reach, scores: Scores, like: Tensor) -> Tensor:
    mask = span.visible(q_T, k_S).unsqueeze(-3)
    if scores.slopes_H is None:
        return mask
    distance = (q_T[..., :, None] - k_S[..., None, :]).unsqueeze(-3)
    bias = -scores.slopes_H[:, None, None] * distance
    return bias.masked_fill(~mask, -math.inf).to(torch.promote_types(like.dtype, torch.float32))


def _blocked(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, window: int, scale: float) -> Tensor:
    """A sliding window as blocks of W queries over their own and the previous block of keys: work 2·W per query."""
    batch, length = q_BHTK.shape[0], q_BHTK.shape[2]
    blocks = -(-length // window)
    q, k, v = (F.pad(x, (0, 0, 0, blocks * window - length)) for x in (q_BHTK, k_BGTK, v_BGTV))
    q = q.unflatten(2, (blocks, window)).transpose(1, 2).flatten(0, 1)
    k, v = (_with_previous(x, blocks, window) for x in (k, v))
    mask = _block_mask(window, blocks, q.device).repeat(batch, 1, 1, 1)
    o = _sdpa(q, k, v, scale, mask)
    return o.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def _with_previous(x_BGTK: Tensor, blocks: int, window: int) -> Tensor:
    """``[B * blocks, G, 2W, K]``: each block behind the one before it; the first has zeros there, which are masked."""
    padded = F.pad(x_BGTK, (0, 0, window, 0))
    pairs = padded.unfold(2, 2 * window, window).transpose(-1, -2)
    return pairs.transpose(1, 2).flatten(0, 1)


@lru_cache(maxsize=64)
def _block_mask(window: int, blocks: int, device: torch.device) -> Tensor:
    """bool ``[blocks, 1, W, 2W]``: key j of a pair lies ``W - j`` before query 0; the first block has no previous."""
    row, column = torch.arange(window, device=device)[:, None], torch.arange(2 * window, device=device)
    band = (column > row) & (column <= row + window)
    first = band & (column >= window)
    return torch.stack([first] + [band] * (blocks - 1))[:, None]


def _on_gpu(q_THK: Tensor, keys: Keys, stream: Stream, span: Span, scores: Scores) -> Tensor:
    """Half precision on a GPU: the batched kernel for equal rows without a window, else the variable-length one, which
    wants keys and values of one width.
    """
    if stream.rows and (span.window is None or span.window >= stream.max_len):
        q, k, v = (x.unflatten(0, (stream.rows, -1)).transpose(1, 2) for x in (q_THK, keys.k, keys.v))
        return _sdpa(q, k, v, scores.scale, causal=True).transpose(1, 2).flatten(0, 1)
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = stream.cu_seqlens, stream.max_len
    left = -1 if span.window is None else span.window - 1
    wide, v_dim = max(keys.k.shape[2], keys.v.shape[2]), keys.v.shape[2]
    q, k, v = (x if x.shape[2] == wide else F.pad(x, (0, wide - x.shape[2])) for x in (q_THK, keys.k, keys.v))
    o_THV = cast(Tensor, varlen_attn(q, k, v, cu, cu, longest, longest, scale=scores.scale, window_size=(left, 0)))
    return o_THV[..., :v_dim]


def _from_state(q_THK: Tensor, keys: Keys, stream: Stream, span: Reach, scores: Scores) -> Tensor:
    """Queries of a decoding step or a chunk over buffers ``[B, G, S, K]``."""
    if stream.rows:
        return _over_buffers(q_THK, keys, stream.positions_T, stream.rows, span, scores)
    outputs = []
    parts = zip(q_THK.split(stream.lengths), stream.positions_T.split(stream.lengths), strict=True)
    for b, (q, position) in enumerate(parts):
        one = slice(b, b + 1)
        own = Keys(keys.k[one], keys.v[one], _positions(keys)[one])
        outputs.append(_over_buffers(q, own, position, 1, span, scores))
    return torch.cat(outputs)


def _positions(keys: Keys) -> Tensor:
    if keys.positions is None:
        raise ValueError("keys of a decoding state have positions")
    return keys.positions


def _mask(keys: Keys, position_BT: Tensor, span: Reach, copies: int, dtype: torch.dtype) -> Tensor:
    """0 or minus infinity, ``[B, 1, copies * T, S]``: the same for all layers of a step, so made by the first."""
    key = (span, copies, dtype)
    if key not in keys.notes:
        hidden_BTS = ~span.visible(position_BT, _positions(keys))
        bias_BTS = torch.zeros(hidden_BTS.shape, dtype=dtype, device=hidden_BTS.device)
        keys.notes[key] = bias_BTS.masked_fill_(hidden_BTS, -math.inf)[:, None].repeat(1, 1, copies, 1)
    return keys.notes[key]


def _over_buffers(q_THK: Tensor, keys: Keys, position_T: Tensor, rows: int, span: Reach, scores: Scores) -> Tensor:
    heads, groups = q_THK.shape[1], keys.k.shape[1]
    exact = keys.exact and span.plain
    if exact and scores.slopes_H is None:  # one token per sequence: nothing to transpose
        q_BGTK = q_THK.unflatten(1, (groups, -1))
        return _sdpa(q_BGTK, keys.k, keys.v, scores.scale).flatten(1, 2)
    # The queries of the heads of one group follow each other as rows, so that the group's keys are read once.
    q_BGTK = q_THK.unflatten(0, (rows, -1)).transpose(1, 2).unflatten(1, (groups, -1)).flatten(2, 3)
    position_BT = position_T.unflatten(0, (rows, -1))
    if scores.slopes_H is not None:
        bias = _bias_at(position_BT, _positions(keys), span, scores, q_THK)
        bias = bias.unflatten(1, (groups, heads // groups)).flatten(2, 3)
    else:
        bias = None if exact else _mask(keys, position_BT, span, heads // groups, q_THK.dtype)
    o = _sdpa(q_BGTK, keys.k, keys.v, scores.scale, bias)
    return o.unflatten(2, (heads // groups, -1)).flatten(1, 2).transpose(1, 2).flatten(0, 1)
