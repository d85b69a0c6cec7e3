"""What both FP8 recipes share: bf16 around the products, and the pieces of a product over rows sorted by matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sextant.axes.numerics.base import Multiplies, Numerics, Product
from sextant.axes.numerics.policy import BF16
from sextant.kernels import matmul
from sextant.kernels.grouped import grouped_linear, padded_grouped_outer


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
        return matmul.linear(x_ND, weight_EFD[0].to(x_ND.dtype))
    with torch.no_grad():
        return grouped_linear(x_ND, weight_EFD.mT, counts_E)


def plain_weight_gradient(x_ND: Tensor, dy_NF: Tensor, counts_E: Tensor) -> Tensor:
    """``dw_EDF`` in the dtype of the rows, sums in fp32: each matrix over its own rows."""
    if x_ND.is_cuda and x_ND.dtype == torch.bfloat16:
        return padded_grouped_outer(x_ND, dy_NF, counts_E)
    parts = zip(x_ND.split(counts_E.tolist()), dy_NF.split(counts_E.tolist()), strict=True)
    return torch.stack([matmul.mm(x.t(), dy) for x, dy in parts])
