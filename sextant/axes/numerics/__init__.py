"""Axis 6, numerics: which tensor in which dtype, and why?"""

from typing import Annotated

from pydantic import Field

from sextant.axes.numerics.base import Numerics
from sextant.axes.numerics.policy import BF16, FP32, FP32_PATHS
from sextant.core.table import Row, Table

AnyNumerics = Annotated[FP32 | BF16, Field(discriminator="kind")]

TABLE = Table(
    "numerics",
    "which tensor in which dtype, and why?",
    (
        Row(FP32, "everything fp32", "reference", (FP32(),)),
        Row(BF16, "bf16 products; fp32 residual, norms, router, logits, masters", "MAI-Base-1, section 12", (BF16(),)),
    ),
)

__all__ = ["BF16", "FP32", "FP32_PATHS", "TABLE", "AnyNumerics", "Numerics"]
