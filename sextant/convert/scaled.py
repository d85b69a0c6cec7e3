"""Files whose matrices are FP8 with a scale for each block of 128 by 128 (DeepSeek-V3; spec deepseek-v3 5.3, 14).

A matrix ``X`` comes with ``X_scale_inv``, which despite its name is what the numbers are multiplied by. Which matrices
are FP8 is told by their dtype, never by their name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sextant.convert.fields import Fields
from sextant.kernels.fp8 import SIDE, Scaled

SCALE = "_scale_inv"
"""What the name of a matrix is followed by in the name of its scales."""


class Restored(Mapping[str, Tensor]):
    """The tensors of a checkpoint under their names, FP8 matrices as the fp32 numbers they stand for."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return restored(tensor, self.tensors[name + SCALE]) if is_fp8(tensor) else tensor

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.tensors if not name.endswith(SCALE))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def restored(values: Tensor, scale: Tensor) -> Tensor:
    """fp32 ``[out, in]`` from FP8 values and ``[ceil(out / 128), ceil(in / 128)]`` multipliers."""
    return Scaled(values, scale.float(), (SIDE, SIDE)).numbers()


def is_fp8(tensor: Tensor) -> bool:
    """Whether the numbers need scales."""
    return tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)


def scale_problems(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What is wrong with scales: one that is missing, without an FP8 matrix, mis-shaped, or no positive number."""
    for name in tensors:
        if name.endswith(SCALE):
            matrix = tensors.get(name.removesuffix(SCALE))
            if matrix is None or not is_fp8(matrix):
                yield f"{name} got {None if matrix is None else matrix.dtype} beside it, expected an FP8 matrix"
        elif is_fp8(tensors[name]):
            yield from _faults(name + SCALE, tensors.get(name + SCALE), tensors[name])


def _faults(name: str, scale: Tensor | None, matrix: Tensor) -> Iterator[str]:
    expected = [-(-size // SIDE) for size in matrix.shape]
    if scale is None:
        yield f"{name} got nothing, expected {expected}"
    elif list(scale.shape) != expected:
        yield f"{name} got {list(scale.shape)}, expected {expected}"
    elif not ((scale.float() > 0) & scale.float().isfinite()).all():
        yield f"{name} got a scale that is not above 0 and finite"


def read_quantisation(fields: Fields) -> None:
    """Take ``quantization_config`` from a configuration, if it says what this module reads.

    Raises:
        UsageError: another method, format or block size, by name.
    """
    given = Fields(fields.take("quantization_config", dict, {}), "config.json: quantization_config")
    given.only(quant_method="fp8", fmt="e4m3", weight_block_size=[SIDE, SIDE], activation_scheme="dynamic")
    given.choose("scale_fmt", {"ue8m0": None, "float": None}, "float")  # either way they lie in the file as numbers
    given.left.pop("modules_to_not_convert", None)
    given.done()
