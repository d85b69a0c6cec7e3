"""The one linear layer of the project, and the embedding: fp32 masters with a role, cast when used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sextant.axes.numerics import Multiplies, Product
from sextant.kernels import matmul


class Role(StrEnum):
    """What a parameter is for: decides its start, its weight decay and its optimiser."""

    EMBEDDING = "embedding"
    HEAD = "head"
    ATTENTION_IN = "attention_in"
    ATTENTION_OUT = "attention_out"
    FF_IN = "ff_in"
    FF_OUT = "ff_out"
    ROUTER = "router"
    GAIN = "gain"
    BIAS = "bias"


class Values(NamedTuple):
    """Which rows of a matrix make attention's values: those whose number modulo ``period`` is at least ``start`` and
    below ``stop``. The default is all rows; joint matrices repeat queries, keys and values by head.
    """

    period: int = 1
    start: int = 0
    stop: int = 1

    def split(self, weight: Tensor) -> list[tuple[bool, Tensor]]:
        """Views of the rows in turn, and whether they do."""
        rows = weight.unflatten(0, (-1, self.period))
        edges = ((False, 0, self.start), (True, self.start, self.stop), (False, self.stop, self.period))
        return [(values, rows[:, start:stop]) for values, start, stop in edges if start < stop]


HIDDEN = frozenset({Role.ATTENTION_IN, Role.ATTENTION_OUT, Role.FF_IN, Role.FF_OUT})
"""Roles of matrices whose products a policy of numerics may lower further than the rest."""


class Linear(nn.Module):
    """``y = x W^T (+ b)`` with ``weight`` [out, in]; computes in the dtype of ``x``, or as its product does.

    ``values`` marks rows that make attention's values, and ``joint`` says how many equal matrices lie one below
    another: what some starts depend on.
    """

    def __init__(
        self, inputs: int, outputs: int, role: Role, bias: bool = False, *, values: Values | None = None, joint: int = 1
    ):
        super().__init__()
        self.role, self.values, self.joint = role, values, {"weight": joint}
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.product: Product | None = None

    def attach(self, make: Callable[[], Product]) -> None:
        """Multiply by a product of its own from now on, if this is a hidden matrix."""
        if self.role in HIDDEN:
            self.product = make()

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.product is None:
            return matmul.linear(x, self.weight.to(x.dtype), bias)
        y = self.product(x, self.weight[None])
        return y if bias is None else y + bias

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, {self.role}"


class Joined(nn.Module):
    """Linear layers of one input as one product: few rows cost little more than the call.

    The layers' weights become views of the joint matrix, so nothing is stored twice and checkpoints look the same. For
    frozen weights: an optimiser would hold the layers' own.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, parts: Sequence[Linear]):
        super().__init__()
        self.widths = [len(part.weight) for part in parts]
        biases = [part.bias.detach() for part in parts if part.bias is not None]
        self.register_buffer("weight", torch.cat([part.weight.detach() for part in parts]), persistent=False)
        self.register_buffer("bias", torch.cat(biases) if biases else None, persistent=False)
        for part, rows in zip(parts, self.weight.split(self.widths), strict=True):
            part.weight.data = rows
        if self.bias is not None:
            for part, values in zip(parts, self.bias.split(self.widths), strict=True):
                part.bias.data = values  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """What each layer gives, as views of one tensor."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return matmul.linear(x, self.weight.to(x.dtype), bias).split_with_sizes(self.widths, -1)


@runtime_checkable
class Joins(Protocol):
    """A module with linear layers that read the same rows."""

    def join(self) -> None:
        """Make one product of them from now on; their weights must be frozen."""
        ...


class Embedding(nn.Module):
    """Rows of ``weight`` [P, D] in the dtype of the residual stream."""

    role = Role.EMBEDDING

    def __init__(self, vocab: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, width))

    def forward(self, tokens_T: Tensor) -> Tensor:
        return F.embedding(tokens_T, self.weight)


def roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter by name: a module's ``role``, or ``roles`` by attribute; else gain or bias."""
    found = {}
    for prefix, module in model.named_modules():
        named: dict[str, Role] = getattr(module, "roles", {})
        default = getattr(module, "role", Role.GAIN)
        for name, _ in module.named_parameters(recurse=False):
            path = f"{prefix}.{name}" if prefix else name
            found[path] = named.get(name, Role.BIAS if name == "bias" else default)
    return found


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the matrices, and stacks of them, whose products a policy may lower further than the rest."""
    owners = {name for name, module in model.named_modules() if isinstance(module, Multiplies)}
    return {name for name, role in roles(model).items() if role in HIDDEN and name.rpartition(".")[0] in owners}
