"""Contract of axis 6: which tensor is held and computed in which dtype, and why."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sextant.core.spec import Spec

Reduce = Callable[[Tensor], Tensor]
"""The elementwise maximum over the ranks that share the tensors."""


DTYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8",
    torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2",
}
"""Short names of the dtypes that tensors may be held or multiplied in."""


class Operands(NamedTuple):
    """What the three products around a matrix multiply, and why: short names of the left and the right operand.

    ``forward`` is rows by matrix, ``data_gradient`` the result's gradient by matrix, ``weight_gradient`` the result's
    gradient by rows.
    """

    forward: tuple[str, str]
    data_gradient: tuple[str, str]
    weight_gradient: tuple[str, str]
    reasons: tuple[str, str, str]


class Product(nn.Module):
    """What stands in a matrix's place in products: ``x W^T`` in another precision, with what that must remember."""

    def forward(self, x: Tensor, weight_EFD: Tensor, counts_E: Tensor | None = None) -> Tensor:
        """Rows ``[..., D]`` times the matrices ``[F, D]`` they belong to.

        Args:
            x: rows; with ``counts_E`` sorted by matrix, ``[N, D]``.
            weight_EFD: master weights; a view in this order of axes will do.
            counts_E: int64, rows of each matrix; None when there is only one.
        """
        raise NotImplementedError


@runtime_checkable
class Multiplies(Protocol):
    """A module with matrices whose products a policy may replace."""

    def attach(self, make: Callable[[], Product]) -> None:
        """Multiply by what ``make`` gives from now on, one for each matrix; or leave things as they are."""
        ...


class Numerics(Spec):
    """A dtype policy. Modules ask it for the compute dtype and leave the fp32 paths alone."""

    @property
    def compute(self) -> torch.dtype | None:
        """What matrix products run in; None leaves tensors as they are (fp32, or fp64 in tests)."""
        raise NotImplementedError

    def lower(self, x: Tensor) -> Tensor:
        """Cast an activation to the compute dtype on its way into a matrix product."""
        return x if self.compute is None else x.to(self.compute)

    @property
    def itemsize(self) -> int:
        """Bytes per element of activations and decoding states."""
        return 4 if self.compute is None else self.compute.itemsize

    @property
    def operands(self) -> Operands:
        """What products of hidden matrices multiply; sums are fp32 under every policy."""
        one = DTYPES[self.compute or torch.float32]
        why = "as the parameters are" if self.compute is None else "half the bytes, sums in fp32"
        return Operands((one, one), (one, one), (one, one), (why, why, why))

    @property
    def serving(self) -> Numerics:
        """The policy under which a model trained with this one is served."""
        return self

    def attach(self, model: nn.Module) -> None:
        """Give the matrices of a new model the products of this policy; none for plain dtypes."""

    def after_step(self, model: nn.Module, reduce: Reduce | None = None) -> int:
        """Take in what the step's tensors were like; called once for each step, after its update.

        Args:
            reduce: for models whose tensors several ranks share.

        Returns:
            Values that a cast had to saturate in this step, on this rank.
        """
        return 0


def products(model: nn.Module) -> Iterator[Product]:
    """Every product that a policy attached, in the order of the modules."""
    return (module for module in model.modules() if isinstance(module, Product))


def is_training_state(name: str) -> bool:
    """Whether an entry of a state dict belongs to a product: training goes on with it, serving needs none."""
    return re.search(r"\.products?\.", name) is not None
