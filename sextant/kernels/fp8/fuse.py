"""Chains of elementwise steps as one kernel on a GPU: the same lines, compiled at their first use there."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function of a tensor compiled when the tensor is on a GPU; as it is when that fails, said once."""
    ways: list[Callable[P, R]] = []

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _on_gpu(args) or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if not ways:
            ways.append(torch.compile(function, dynamic=True))
        try:
            with torch.no_grad():  # one mode, so that forward and backward share what is compiled
                return ways[0](*args, **kwargs)
        except Exception as error:  # a compiler may fail in any way; what it would have compiled is at hand
            warnings.warn(f"fp8: {function.__name__} stays eager, torch.compile failed: {error}", stacklevel=2)
            ways[0] = function
            return function(*args, **kwargs)

    return call


def _on_gpu(args: tuple[Any, ...]) -> bool:
    return any(isinstance(value, Tensor) and value.is_cuda for value in args)
