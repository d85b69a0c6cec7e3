"""Switch-Base (2101.03961) read as a decoder: one expert per token in every second layer, capacity with drops.

The original is T5: an encoder, and a decoder that also looks at it, of 12 layers each, trained to fill in spans. This
is one such stack, causal, trained to predict the next token; rotary codes stand for T5's relative biases and AdamW for
Adafactor. :func:`encoder_decoder` counts the original from the same layers.
"""

from __future__ import annotations

import math

from sextant.axes.capacity import Dense, Experts
from sextant.axes.kv import GQA, RoPE
from sextant.axes.routing import Auxiliary, Switch
from sextant.axes.routing.overflow import Capacity
from sextant.axes.stability import NormalInit, PreNorm, RMSNorm
from sextant.core.cost import At
from sextant.model.spec import ModelSpec, repeat, stack
from sextant.recipes.base import paper_run, twin_run
from sextant.train.optim import AdamW
from sextant.train.run import Batch, Run
from sextant.train.schedule import Cosine

NORM = RMSNorm(eps=1e-6)
SEQ_LEN, STEPS = 512, 100_000
CAPACITY = Capacity(factor=1.25, eval_factor=2.0, order="position", group="tokens")
BALANCE = (Auxiliary(coef=0.01, counts="first"),)


def model(
    name: str, vocab: int, width: int, depth: int, heads: int, experts: int, hidden: int, std: float
) -> ModelSpec:
    """A dense layer, then a sparse one, in turn."""
    sparse = Experts(
        experts=experts, hidden=hidden, router=Switch(jitter=0.01), overflow=CAPACITY, balance=BALANCE,
        activation="geglu",
    )
    kv = GQA(heads=heads, kv_heads=heads, head_dim=width // heads, position=RoPE())
    feed_forward = repeat([Dense(hidden=hidden, activation="geglu"), sparse], depth)
    return ModelSpec(
        name=name, vocab=vocab, width=width, context=SEQ_LEN, tied=True, final_norm=NORM, init=NormalInit(std=std),
        layers=stack(depth, kv=kv, feed_forward=feed_forward, residual=PreNorm(norm=NORM)),
    )


def encoder_decoder(spec: ModelSpec) -> int:
    """Parameters of T5 with these layers: two stacks, attention over the encoder in the second, one embedding table."""
    at = At(1)
    stacks = 2 * sum(layer.cost(spec.width, at).params for layer in spec.layers)
    across = sum(layer.attention_cost(spec.width, at).params for layer in spec.layers)
    return stacks + across + spec.vocab * spec.width


def paper() -> Run:
    """3.71 B parameters, 0.11 B active; with the encoder 7.41 B. Matrices start at a tenth of the usual variance."""
    spec = model("switch-base", 32_128, 768, 12, 12, 128, 2048, std=math.sqrt(0.1 / 768))
    return paper_run(spec, SEQ_LEN, AdamW(lr=1e-3), Cosine(warmup=10_000), Batch(rows=2048, micro_rows=1), STEPS)


def twin() -> Run:
    """Four layers of width 128, two of them with 16 experts."""
    return twin_run(model("switch-base-twin", 4096, 128, 4, 4, 16, 192, std=0.02), lanes=1)
