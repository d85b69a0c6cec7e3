"""What both FP8 recipes share: bf16 around the products, and the pieces of a product over rows sorted by matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sextant.axes.numerics.base import Multiplies, Numerics, Product
from sextant.axes.numerics.policy import BF16
from sextant.kernels.fp8 import SIDE
from sextant.kernels.grouped import grouped_linear


class FP8(Numerics):
    """Base of the FP8 policies: hidden matrices multiply in FP8; all else, the list of fp32 paths too, as in bf16.

    Embedding, head, router, norms and attention's core are no product of a hidden matrix and stay as they are.
    """

    @property
    def compute(self) -> torch.dtype | None:
        return torch.bfloat16

    @property
    def serving(self) -> Numerics:
        return BF16()

    def product(self) -> Product:
        """A product for one matrix, or one stack of them."""
        raise NotImplementedError

    def attach(self, model: nn.Module) -> None:
        for module in list(model.modules()):
            if isinstance(module, Multiplies):
                module.attach(self.product)


def recomputing() -> bool:
    """Whether a forward runs inside a backward, as recomputation does: what it does was counted before."""
    return torch._C._current_graph_task_id() != -1


def plain_rows(x_ND: Tensor, weight_EFD: Tensor, counts_E: Tensor | None) -> Tensor:
    """``y_NF`` in the dtype of the rows, as without any policy."""
    if counts_E is None:
        return F.linear(x_ND, weight_EFD[0].to(x_ND.dtype))
    with torch.no_grad():
        return grouped_linear(x_ND, weight_EFD.mT, counts_E)


def plain_weight_gradient(x_ND: Tensor, dy_NF: Tensor, counts_E: Tensor) -> Tensor:
    """``dw_EDF`` in the dtype of the rows, sums in fp32: each matrix over its own rows."""
    if x_ND.is_cuda and x_ND.dtype == torch.bfloat16:
        return F.grouped_mm(x_ND.t(), dy_NF, offs=counts_E.cumsum(0, dtype=torch.int32))
    parts = zip(x_ND.split(counts_E.tolist()), dy_NF.split(counts_E.tolist()), strict=True)
    return torch.stack([x.t() @ dy for x, dy in parts])


def aligned(counts_E: Tensor | None, rows: int, device: torch.device) -> tuple[Tensor | None, Tensor, int]:
    """Where rows go so that those of each matrix begin at a multiple of 128.

    Returns:
        The place of each row (None: where it is), the tiles of each matrix, and a number of places that is enough
        whatever the counts are, so that no count has to leave the device.
    """
    if counts_E is None:
        count = -(-rows // SIDE)
        return None, torch.full((1,), count, dtype=torch.int64, device=device), count * SIDE
    tiles_E = (counts_E + SIDE - 1) // SIDE
    shift_E = (tiles_E.cumsum(0) - tiles_E) * SIDE - (counts_E.cumsum(0) - counts_E)
    shift_N = shift_E.repeat_interleave(counts_E, output_size=rows)
    return torch.arange(rows, device=device) + shift_N, tiles_E, (rows // SIDE + len(counts_E)) * SIDE


def placed(x_ND: Tensor, place_N: Tensor | None, places: int) -> Tensor:
    """Rows at their places ``[places, D]``, zeros between."""
    if place_N is None:
        return F.pad(x_ND, (0, 0, 0, places - len(x_ND)))
    return x_ND.new_zeros(places, x_ND.shape[1]).index_copy_(0, place_N, x_ND)
