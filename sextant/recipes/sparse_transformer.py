"""Sparse Transformer (1904.10509) on bytes: the 30-layer EnWik8 model, fixed pattern, both key sets in one mask.

Blocks of 128, 32 columns of every past block, and the heads read distinct columns. The original's learned positions by
block and column are rotary ones here; its vocabulary of bytes has the project's three control tokens beside it.
"""

from __future__ import annotations

from sextant.axes.attention import Fixed
from sextant.axes.capacity import Dense
from sextant.axes.kv import GQA, RoPE
from sextant.axes.stability import LayerNorm, PreNorm
from sextant.model.spec import Layer, ModelSpec, stack
from sextant.recipes.base import published_only, twin_run
from sextant.train.run import Run

NORM = LayerNorm()


def layers(count: int, *, heads: int, head_dim: int, hidden: int, pattern: Fixed) -> tuple[Layer, ...]:
    """The same pattern in every layer."""
    return stack(
        count, attention=pattern, kv=GQA(heads=heads, kv_heads=heads, head_dim=head_dim, position=RoPE(), bias=True),
        feed_forward=Dense(hidden=hidden, activation="gelu"), residual=PreNorm(norm=NORM),
    )


def paper() -> Run:
    """30 layers of width 512 on 12,288 bytes: 94.7 M parameters, 95 M published."""
    pattern = Fixed(block=128, columns=32, heads="merged", subblocks="distinct")
    return published_only(ModelSpec(
        name="sparse-transformer", vocab=259, width=512, context=12_288, final_norm=NORM,
        layers=layers(30, heads=8, head_dim=64, hidden=2048, pattern=pattern),
    ))


def twin() -> Run:
    """Four layers of width 128, blocks of 16 with 4 columns."""
    pattern = Fixed(block=16, columns=4, heads="merged", subblocks="distinct")
    return twin_run(ModelSpec(
        name="sparse-transformer-twin", vocab=4096, width=128, context=512, tied=True, final_norm=NORM,
        layers=layers(4, heads=4, head_dim=32, hidden=512, pattern=pattern),
    ))
