"""Products of many small matrices with the rows that belong to each: the work inside a mixture of experts.

Rows lie sorted by expert; ``counts_E`` says how many each has. Empty experts are ordinary: no work, zero gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sextant.kernels import matmul


def grouped_linear_reference(x_ND: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """One product per expert, by autograd: the truth for :func:`grouped_linear`."""
    rows = x_ND.split(counts_E.tolist())
    return torch.cat([matmul.mm(x, weight) for x, weight in zip(rows, weight_EDF, strict=True)])


class _Loop(torch.autograd.Function):
    """One product per expert into preallocated memory; the fast path on a CPU, where a call costs little."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_EDF: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        ctx.save_for_backward(x_ND, weight_EDF)
        return _products(x_ND, weight_EDF, counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, weight_EDF = ctx.saved_tensors
        dy_NF = grads[0].contiguous()
        dx_ND, dweight_EDF = torch.empty_like(x_ND), torch.empty_like(weight_EDF)
        parts = zip(x_ND.split(ctx.counts), dy_NF.split(ctx.counts), dx_ND.split(ctx.counts), strict=True)
        for (x, dy, dx), weight, dweight in zip(parts, weight_EDF, dweight_EDF, strict=True):
            matmul.mm_into(dy, weight.t(), dx)
            matmul.mm_into(x.t(), dy, dweight)
        return dx_ND, dweight_EDF, None


def _products(x_ND: Tensor, weight_EDF: Tensor, counts: list[int]) -> Tensor:
    y_NF = x_ND.new_empty(x_ND.shape[0], weight_EDF.shape[2])
    for x, weight, y in zip(x_ND.split(counts), weight_EDF, y_NF.split(counts), strict=True):
        if x.shape[0]:  # few experts are met by one decoding step
            matmul.mm_into(x, weight, y)
    return y_NF


class _SwiGLU(torch.autograd.Function):
    """Up, SwiGLU and down expert by expert: what lies between the products is still in the cache, and is not kept."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, up_EDF: Tensor, down_EFD: Tensor, counts: list[int]) -> Tensor:
        h_NF, y_ND = x_ND.new_empty(x_ND.shape[0], up_EDF.shape[2]), torch.empty_like(x_ND)
        hidden = x_ND.new_empty(max(counts), down_EFD.shape[1])
        rows = (part.split(counts) for part in (x_ND, h_NF, y_ND))
        for x, h, y, up, down in zip(*rows, up_EDF, down_EFD, strict=True):
            gate, value = matmul.mm_into(x, up, h).chunk(2, dim=1)
            matmul.mm_into(_silu(gate, hidden[: len(x)]).mul_(value), down, y)
        ctx.counts = counts
        ctx.save_for_backward(x_ND, h_NF, up_EDF, down_EFD)
        return y_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_ND, h_NF, up_EDF, down_EFD = ctx.saved_tensors
        dx_ND, dup_EDF, ddown_EFD = (torch.empty_like(part) for part in (x_ND, up_EDF, down_EFD))
        longest = max(ctx.counts)
        buffers = [x_ND.new_empty(longest, down_EFD.shape[1]) for _ in range(3)]
        dhidden = x_ND.new_empty(longest, up_EDF.shape[2])
        rows = (part.split(ctx.counts) for part in (x_ND, h_NF, grads[0].contiguous(), dx_ND))
        for x, h, dy, dx, up, down, dup, ddown in zip(*rows, up_EDF, down_EFD, dup_EDF, ddown_EFD, strict=True):
            dh = dhidden[: len(x)]
            a = _swiglu_gradient(h, matmul.mm_into(dy, down.t(), buffers[0][: len(x)]), dh, buffers[1:])
            matmul.mm_into(a.t(), dy, ddown)
            matmul.mm_into(x.t(), dh, dup)
            matmul.mm_into(dh, up.t(), dx)
        return dx_ND, dup_EDF, ddown_EFD, None


def _silu(gate: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.silu.out(gate, out=out)


def _swiglu_gradient(h_NF: Tensor, da: Tensor, dh_NF: Tensor, buffers: list[Tensor]) -> Tensor:
    """Writes the gradient by gate and value into ``dh_NF``, uses up ``da``, and gives the activations once more."""
    (gate, value), (dgate, dvalue) = h_NF.chunk(2, dim=1), dh_NF.chunk(2, dim=1)
    silu = _silu(gate, buffers[0][: len(da)])
    torch.mul(da, silu, out=dvalue)
    torch.ops.aten.silu_backward.grad_input(da.mul_(value), gate, grad_input=dgate)
    return torch.mul(silu, value, out=buffers[1][: len(da)])


def row_tile(x: Tensor, rows: int) -> int:
    """What each expert's share of ``rows`` rows should be a multiple of.

    Half-precision products are compiled for each new shape on a CPU: with many rows nearly every step has new shapes.
    """
    compiled = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and not matmul.is_slow(x)
    return 32 if rows >= 1024 and compiled else 1


def row_linear(x_ND: Tensor, weight_EDF: Tensor, experts: list[int]) -> Tensor:
    """Row n times the matrix of ``experts[n]``, in any order: for the few rows of a decoding step; no gradient."""
    weight_EDF = weight_EDF.to(x_ND.dtype)
    y_NF = x_ND.new_empty(x_ND.shape[0], weight_EDF.shape[2])
    for n, expert in enumerate(experts):
        matmul.mm_into(x_ND[n : n + 1], weight_EDF[expert], y_NF[n : n + 1])
    return y_NF


def grouped_linear(x_ND: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """Rows of expert e times ``weight_EDF[e]``: ``y_NF``.

    Args:
        x_ND: rows sorted by expert.
        weight_EDF: one matrix per expert, cast to the rows' dtype.
        counts_E: int64, rows of each expert; they sum to N.
    """
    weight_EDF = weight_EDF.to(x_ND.dtype)
    if x_ND.is_cuda and x_ND.dtype == torch.bfloat16:
        return padded_grouped_mm(x_ND, weight_EDF, counts_E)
    if torch.compiler.is_compiling():  # compilers follow plain operations best
        return grouped_linear_reference(x_ND, weight_EDF, counts_E)
    counts = counts_E.tolist()
    if torch.is_grad_enabled():
        return _Loop.apply(x_ND, weight_EDF, counts)  # type: ignore[return-value]
    return _products(x_ND, weight_EDF, counts)


def padded_grouped_mm(x_ND: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """torch's grouped product, which wants some rows, and widths that are multiples of 16 bytes: zeros fill them up."""
    if not len(x_ND):
        return x_ND @ weight_EDF[0]
    width, weight_EDF = weight_EDF.shape[2], _filled(_filled(weight_EDF).mT).mT
    return F.grouped_mm(_filled(x_ND), weight_EDF, offs=counts_E.cumsum(0, dtype=torch.int32))[:, :width]


def padded_grouped_outer(x_ND: Tensor, dy_NF: Tensor, counts_E: Tensor) -> Tensor:
    """The same for weights' gradients: ``dw_EDF``, for each expert the product of its rows of both."""
    depth, width = x_ND.shape[1], dy_NF.shape[1]
    if not len(x_ND):
        return x_ND.new_zeros(len(counts_E), depth, width)
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    return F.grouped_mm(_filled(x_ND).t(), _filled(dy_NF), offs=ends_E)[:, :depth, :width]


def _filled(x: Tensor) -> Tensor:
    """Zeros up to a multiple of eight columns."""
    more = -x.shape[-1] % 8
    return F.pad(x, (0, more)) if more else x


def grouped_swiglu_reference(x_ND: Tensor, up_EDF: Tensor, down_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """Two grouped products around ``silu(gate) * value``: the truth for :func:`grouped_swiglu`."""
    gate_NF, value_NF = grouped_linear(x_ND, up_EDF, counts_E).chunk(2, dim=-1)
    return grouped_linear(F.silu(gate_NF) * value_NF, down_EFD, counts_E)


def grouped_swiglu(x_ND: Tensor, up_EDF: Tensor, down_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """Experts with SwiGLU as a whole: ``y_ND`` from rows sorted by expert (2002.05202).

    Args:
        x_ND: rows sorted by expert.
        up_EDF: gate and value side by side, twice the width F of ``down_EFD``.
        down_EFD: the way back.
        counts_E: int64, rows of each expert; they sum to N.
    """
    if x_ND.is_cuda or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return grouped_swiglu_reference(x_ND, up_EDF, down_EFD, counts_E)
    weights = (up_EDF.to(x_ND.dtype), down_EFD.to(x_ND.dtype))
    return _SwiGLU.apply(x_ND, *weights, counts_E.tolist())  # type: ignore[return-value]
