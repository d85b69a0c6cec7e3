"""GLaM 64B/64E (2112.06905): a decoder of 64 layers, every second one a mixture of 64 experts of which a token meets 2.

Dense layers are gated, experts are not: with that reading both published counts come out. Rotary codes stand for its
relative biases and AdamW for Adafactor; its loss on the size of the output's logits is not in this version.
"""

from __future__ import annotations

from sextant.axes.capacity import Dense, Experts
from sextant.axes.kv import GQA, RoPE
from sextant.axes.routing import Auxiliary, SoftmaxTopK
from sextant.axes.routing.overflow import Capacity
from sextant.axes.stability import PreNorm, RMSNorm
from sextant.model.spec import ModelSpec, repeat, stack
from sextant.recipes.base import paper_run, twin_run
from sextant.train.optim import AdamW
from sextant.train.run import Batch, Run
from sextant.train.schedule import Cosine

NORM = RMSNorm(eps=1e-6)
TOKENS, SEQ_LEN, ROWS = 600e9, 1024, 1024
CAPACITY = Capacity(factor=1.0, order="choice", group="tokens")
"""GShard's: twice the tokens over the experts, which is once the copies."""


def model(
    name: str, *, vocab: int, width: int, depth: int, heads: int, head_dim: int, experts: int, hidden: int, context: int
) -> ModelSpec:
    """A dense layer, then a mixture, in turn."""
    sparse = Experts(
        experts=experts, hidden=hidden, router=SoftmaxTopK(top_k=2, normalize=True), overflow=CAPACITY,
        balance=(Auxiliary(coef=0.01, counts="first"),), activation="gelu",
    )
    kv = GQA(heads=heads, kv_heads=heads, head_dim=head_dim, position=RoPE())
    feed_forward = repeat([Dense(hidden=hidden, activation="geglu"), sparse], depth)
    return ModelSpec(
        name=name, vocab=vocab, width=width, context=context, tied=True, final_norm=NORM,
        layers=stack(depth, kv=kv, feed_forward=feed_forward, residual=PreNorm(norm=NORM)),
    )


def paper() -> Run:
    """1.16 T parameters, 96.6 B active; published as 1.2 T and 96.6 B."""
    spec = model(
        "glam", vocab=256_000, width=8192, depth=64, heads=128, head_dim=128, experts=64, hidden=32_768,
        context=SEQ_LEN,
    )
    steps = round(TOKENS / (ROWS * SEQ_LEN))
    return paper_run(spec, SEQ_LEN, AdamW(lr=3e-4), Cosine(warmup=10_000), Batch(rows=ROWS, micro_rows=1), steps)


def twin() -> Run:
    """Four layers of width 128, two of them with 16 experts."""
    return twin_run(model(
        "glam-twin", vocab=4096, width=128, depth=4, heads=4, head_dim=32, experts=16, hidden=256, context=512
    ), lanes=1)
