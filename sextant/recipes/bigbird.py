"""BigBird (2007.14062) as a causal model: the base size, blocks of 64, of which near, first and random ones are read.

The published model is an encoder (ITC: one block on each side, the first and last global, three random). Read causally
a query has its own block and the two before it, the first two, and three random ones of its past, drawn anew for every
layer and head. Learned positions of the original are rotary ones here.
"""

from __future__ import annotations

from sextant.axes.attention import BigBird
from sextant.axes.capacity import Dense
from sextant.axes.kv import GQA, RoPE
from sextant.axes.stability import LayerNorm, PreNorm
from sextant.model.spec import Layer, ModelSpec, stack
from sextant.recipes.base import published_only, twin_run
from sextant.train.run import Run

NORM = LayerNorm(eps=1e-12)


def layers(count: int, *, heads: int, head_dim: int, hidden: int, pattern: BigBird) -> tuple[Layer, ...]:
    """Every layer draws by its own seed."""
    return stack(
        count, attention=[pattern.replace(seed=layer) for layer in range(count)],
        kv=GQA(heads=heads, kv_heads=heads, head_dim=head_dim, position=RoPE(), bias=True),
        feed_forward=Dense(hidden=hidden, activation="gelu_tanh"), residual=PreNorm(norm=NORM),
    )


def paper() -> Run:
    """12 layers of width 768: 123.7 M parameters, embedding tied."""
    return published_only(ModelSpec(
        name="bigbird", vocab=50_358, width=768, context=4096, tied=True, final_norm=NORM,
        layers=layers(12, heads=12, head_dim=64, hidden=3072, pattern=BigBird()),
    ))


def twin() -> Run:
    """Four layers of width 128, blocks of 16: at 256 tokens a query reads at most 6 of 16 blocks."""
    pattern = BigBird(block=16, window=2, global_blocks=1, random=3)
    return twin_run(ModelSpec(
        name="bigbird-twin", vocab=4096, width=128, context=512, tied=True, final_norm=NORM,
        layers=layers(4, heads=4, head_dim=32, hidden=512, pattern=pattern),
    ))
