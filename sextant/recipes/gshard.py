"""GShard (2006.16668) read as a decoder: 2,048 experts in every second layer, two met, the second at random.

The original translates with an encoder and a decoder; this is one causal stack of its layers with rotary codes, trained
to predict the next token. Vocabulary and training settings are ours; Lingvo's constant 0.01 weighs the balance loss.
"""

from __future__ import annotations

from sextant.axes.capacity import Dense, Experts
from sextant.axes.kv import GQA, RoPE
from sextant.axes.routing import Auxiliary, GShard
from sextant.axes.routing.overflow import Capacity
from sextant.axes.stability import LayerNorm, PreNorm
from sextant.model.spec import ModelSpec, repeat, stack
from sextant.recipes.base import published_only, twin_run
from sextant.train.run import Run

NORM = LayerNorm(eps=1e-6)
CAPACITY = Capacity(factor=1.0, order="choice", group="tokens")
"""``2 N / E`` places for each expert: as many as there are copies, if none strays."""


def model(
    name: str, *, vocab: int, width: int, depth: int, heads: int, head_dim: int, experts: int, hidden: int, context: int
) -> ModelSpec:
    """A dense layer, then a mixture, in turn."""
    sparse = Experts(
        experts=experts, hidden=hidden, router=GShard(), overflow=CAPACITY,
        balance=(Auxiliary(coef=0.01, counts="first"),), activation="relu",
    )
    kv = GQA(heads=heads, kv_heads=heads, head_dim=head_dim, position=RoPE())
    feed_forward = repeat([Dense(hidden=hidden, activation="relu"), sparse], depth)
    return ModelSpec(
        name=name, vocab=vocab, width=width, context=context, tied=True, final_norm=NORM,
        layers=stack(depth, kv=kv, feed_forward=feed_forward, residual=PreNorm(norm=NORM)),
    )


def sized(experts: int, depth: int) -> ModelSpec:
    """One of the paper's six: 128, 512 or 2,048 experts, 12 or 36 layers."""
    return model(
        f"gshard-{experts}e-{depth}l", vocab=64_000, width=1024, depth=depth, heads=16, head_dim=128, experts=experts,
        hidden=8192, context=1024,
    )


def paper() -> Run:
    """The largest, published as 600 B: 619.2 B parameters, of which 618.5 B are experts."""
    return published_only(sized(2048, 36).replace(name="gshard"))


def twin() -> Run:
    """Four layers of width 128, two of them with 16 experts."""
    return twin_run(model(
        "gshard-twin", vocab=4096, width=128, depth=4, heads=4, head_dim=32, experts=16, hidden=256, context=512
    ), lanes=1)
