"""Axis 6, numerics: which tensor in which dtype, and why?"""

from typing import Annotated

from pydantic import Field

from sextant.axes.numerics.base import (
    DTYPES,
    Multiplies,
    Numerics,
    Operands,
    Product,
    is_training_state,
    products,
)
from sextant.axes.numerics.blocks import FP8Blocks
from sextant.axes.numerics.delayed import FP8Delayed
from sextant.axes.numerics.eight_bit import EightBit, EightBitKind, eight_bit
from sextant.axes.numerics.policy import BF16, FP32, FP32_PATHS
from sextant.core.table import Row, Table

AnyNumerics = Annotated[FP32 | BF16 | FP8Delayed | FP8Blocks, Field(discriminator="kind")]

TABLE = Table(
    "numerics",
    "which tensor in which dtype, and why?",
    (
        Row(FP32, "everything fp32", "reference", (FP32(),)),
        Row(BF16, "bf16 products; fp32 residual, norms, router, logits, masters", "MAI-Base-1, section 12", (BF16(),)),
        Row(
            FP8Delayed,
            "bf16, but E4M3 forward and E5M2 data-gradient products, one scale per tensor from 1,024 steps",
            "MAI-Base-1, section 12; Transformer Engine",
            (
                FP8Delayed(), FP8Delayed(history=3, margin=1),
                FP8Delayed(forward="bf16", data_gradient="e4m3"), FP8Delayed(data_gradient="bf16"),
            ),
        ),
        Row(
            FP8Blocks,
            "bf16, but E4M3 for all products of hidden matrices, a scale per 1x128 tile and 128x128 block",
            "DeepSeek-V3, section 3.3 of 2412.19437",
            (FP8Blocks(), FP8Blocks(power_of_two=True)),
        ),
    ),
)

__all__ = [
    "BF16", "DTYPES", "FP32", "FP32_PATHS", "TABLE", "AnyNumerics", "EightBit", "EightBitKind", "FP8Blocks",
    "FP8Delayed", "Multiplies", "Numerics", "Operands", "Product", "eight_bit", "is_training_state", "products",
]
