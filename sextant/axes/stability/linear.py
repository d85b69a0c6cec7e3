"""The one linear layer of the project, and the embedding: fp32 masters with a role, cast when used."""

from __future__ import annotations

from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class Linear(nn.Module):
    """``y = x W^T (+ b)`` with ``weight`` [out, in]; computes in the dtype of ``x``."""

    def __init__(self, inputs: int, outputs: int, role: Role, bias: bool = False):
        super().__init__()
        self.role = role
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, {self.role}"


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
