"""Longformer (2004.05150) as a causal model: the base size, windows of 512, gaps in the windows of two heads above.

The published base model is an encoder: 256 keys on each side and chosen global tokens. Read causally the window lies
before the token, and the first token of a sequence is global. The gaps are those of the paper's causal character model:
none in the lower half, then one key in 2, 3 and 4. Learned positions of the original are rotary ones here.
"""

from __future__ import annotations

from sextant.axes.attention import Longformer
from sextant.axes.capacity import Dense
from sextant.axes.kv import GQA, RoPE
from sextant.axes.stability import LayerNorm, PreNorm
from sextant.model.spec import Layer, ModelSpec, stack
from sextant.recipes.base import published_only, twin_run
from sextant.train.run import Run

NORM = LayerNorm(eps=1e-5)
DILATED_HEADS = 2


def layers(count: int, *, heads: int, head_dim: int, hidden: int, window: int) -> tuple[Layer, ...]:
    """The lower half reads without gaps; above, two heads read ever further apart."""
    half = count // 2
    dilations = [1] * half + [2 + 3 * above // (count - half) for above in range(count - half)]
    patterns = [
        Longformer(window=window, global_tokens=1, dilation=d, dilated=DILATED_HEADS if d > 1 else 0)
        for d in dilations
    ]
    return stack(
        count, attention=patterns,
        kv=GQA(heads=heads, kv_heads=heads, head_dim=head_dim, position=RoPE(), bias=True),
        feed_forward=Dense(hidden=hidden, activation="gelu"), residual=PreNorm(norm=NORM),
    )


def paper() -> Run:
    """12 layers of width 768: 123.6 M parameters, embedding tied."""
    return published_only(ModelSpec(
        name="longformer", vocab=50_265, width=768, context=4096, tied=True, final_norm=NORM,
        layers=layers(12, heads=12, head_dim=64, hidden=3072, window=512),
    ))


def twin() -> Run:
    """Six layers of width 128, windows of 32, gaps up to 4."""
    return twin_run(ModelSpec(
        name="longformer-twin", vocab=4096, width=128, context=512, tied=True, final_norm=NORM,
        layers=layers(6, heads=4, head_dim=32, hidden=512, window=32),
    ))
