"""The sparsely-gated mixture of 2017 (1701.06538) on a transformer: noisy top-k, 4 of 256 experts, two losses.

The original stands between two LSTMs of width 512: MoE-256 of its study on one billion words. Here each LSTM is an
attention layer, the first followed by the mixture, the second by a dense layer as wide as one expert: it is the router,
the experts and the losses of 2017, not the network. :func:`published_millions` counts the original by this mixture.
"""

from __future__ import annotations

from sextant.axes.capacity import Dense, Experts
from sextant.axes.kv import GQA, RoPE
from sextant.axes.routing import Importance, NoisyTopK, SmoothLoad
from sextant.core.cost import At
from sextant.model.spec import ModelSpec, stack
from sextant.recipes.base import published_only, twin_run
from sextant.train.run import Run

TOP_K = 4
BALANCE = (Importance(coef=0.1), SmoothLoad(coef=0.1))


def mixture(experts: int, hidden: int) -> Experts:
    """Experts of one ReLU layer, met by noisy top-k."""
    router = NoisyTopK(top_k=TOP_K)
    return Experts(experts=experts, hidden=hidden, router=router, balance=BALANCE, activation="relu")


def model(name: str, vocab: int, width: int, heads: int, experts: int, hidden: int, context: int) -> ModelSpec:
    """Two layers, the first with the mixture."""
    kv = GQA(heads=heads, kv_heads=heads, head_dim=width // heads, position=RoPE())
    feed_forward = [mixture(experts, hidden), Dense(hidden=hidden, activation="relu")]
    return ModelSpec(
        name=name, vocab=vocab, width=width, context=context, layers=stack(2, kv=kv, feed_forward=feed_forward)
    )


def published_millions(experts: int, width: int = 512, hidden: int = 1024) -> float:
    """Parameters of the original without embedding and softmax: the mixture, and an LSTM on either side of it."""
    lstm = 4 * (2 * width * width + width)
    return (mixture(experts, hidden).cost(width, At(1)).params + 2 * lstm) / 1e6


def paper() -> Run:
    """1.08 B parameters, of which 0.81 B are the tables of 793,471 words and 0.27 B the mixture."""
    return published_only(model("shazeer-2017", 793_471, 512, 8, 256, 1024, context=128))


def twin() -> Run:
    """Two layers of width 128, 4 of 32 experts."""
    return twin_run(model("shazeer-2017-twin", 4096, 128, 4, 32, 128, context=512), lanes=1)
