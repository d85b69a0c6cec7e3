"""Activations of a feed-forward layer; gated ones take twice the width in and multiply the halves."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Activation = Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu", "relu2"]


def is_gated(name: Activation) -> bool:
    """Whether the up-projection gives a gate beside the value."""
    return "glu" in name


def activate(name: Activation, gate: Tensor, value: Tensor | None = None) -> Tensor:
    """``act(gate) * value`` for gated kinds, ``act(gate)`` otherwise."""
    if name == "swiglu":
        y = F.silu(gate)
    elif name in ("relu", "relu2"):
        y = F.relu(gate) if name == "relu" else F.relu(gate).square()
    else:
        y = F.gelu(gate, approximate="tanh" if name.endswith("tanh") else "none")
    return y if value is None else y * value
