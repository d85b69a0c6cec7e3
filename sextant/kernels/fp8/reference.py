"""Products of scaled fp8 tensors by restoring their numbers: the truth for the device's kernels, and what a CPU runs.

Both operands are contracted along their last axis. ``counts_E`` splits the left operand's rows among E matrices,
``tiles_E`` the tiles of N; None gives all to the only one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sextant.kernels.fp8.scaling import SIDE, Scaled


def rows_reference(x: Scaled, weight: Scaled, counts_E: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``y_NF``: rows ``[N, D]`` times ``[E, F, D]``, in fp32."""
    x_ND, weight_EFD = x.numbers(), weight.numbers()
    if counts_E is None:
        return (x_ND @ weight_EFD[0].t()).to(dtype)
    parts = zip(x_ND.split(counts_E.tolist()), weight_EFD, strict=True)
    return torch.cat([rows @ matrix.t() for rows, matrix in parts]).to(dtype)


def columns_reference(dy: Scaled, x: Scaled, tiles_E: Tensor | None) -> Tensor:
    """``dw_EFD``: ``[F, N]`` times ``[D, N]``, expert by expert, each of which owns ``tiles_E`` tiles of N, in fp32."""
    if tiles_E is None:
        return (dy.numbers() @ x.numbers().t())[None]
    counts = (tiles_E * SIDE).tolist()
    parts = zip(dy.numbers().split([*counts, dy.values.shape[1] - sum(counts)], dim=1)[:-1],
                x.numbers().split([*counts, x.values.shape[1] - sum(counts)], dim=1)[:-1], strict=True)
    return torch.stack([left @ right.t() for left, right in parts])


def rows_in_bf16(x: Scaled, weight: Scaled, counts_E: Tensor | None, dtype: torch.dtype) -> Tensor:
    """:func:`rows_reference` with restored numbers rounded to bf16: for a GPU without a kernel for the product."""
    x_ND, weight_EFD = x.numbers(torch.bfloat16), weight.numbers(torch.bfloat16)
    if counts_E is None:
        return (x_ND @ weight_EFD[0].t()).to(dtype)
    return F.grouped_mm(x_ND, weight_EFD.mT, offs=counts_E.cumsum(0, dtype=torch.int32)).to(dtype)


def columns_in_bf16(dy: Scaled, x: Scaled, tiles_E: Tensor | None) -> Tensor:
    """:func:`columns_reference` with restored numbers rounded to bf16."""
    dy_FN, x_DN = dy.numbers(torch.bfloat16), x.numbers(torch.bfloat16)
    if tiles_E is None:
        return (dy_FN @ x_DN.t())[None].float()
    return F.grouped_mm(dy_FN, x_DN.t(), offs=(tiles_E * SIDE).cumsum(0, dtype=torch.int32)).float()
