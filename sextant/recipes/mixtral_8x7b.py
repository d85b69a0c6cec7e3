"""Mixtral 8x7B (2401.04088): Mistral's shape with eight experts per layer, two met, gates normalised over the two."""

from __future__ import annotations

from sextant.axes.capacity import Experts
from sextant.axes.kv import GQA, RoPE
from sextant.axes.routing import Auxiliary, SoftmaxTopK
from sextant.axes.stability import PreNorm, RMSNorm
from sextant.model.spec import ModelSpec, stack
from sextant.recipes.base import published_only, twin_run
from sextant.train.run import Run

NORM = RMSNorm(eps=1e-5)


RELEASED_COEF, TOP_K = 0.02, 2


def experts(hidden: int, layers: int) -> Experts:
    """Eight experts of this width.

    The released coefficient weighs a loss that is averaged over layers and is ``TOP_K`` under perfect balance; ours is
    added up over layers and is 1 there.
    """
    balance = (Auxiliary(coef=RELEASED_COEF * TOP_K / layers),)
    return Experts(experts=8, hidden=hidden, router=SoftmaxTopK(top_k=TOP_K, normalize=True), balance=balance)


def paper() -> Run:
    """46.70 B parameters, 12.88 B active."""
    return published_only(ModelSpec(
        name="mixtral-8x7b", vocab=32_000, width=4096, context=32_768, final_norm=NORM,
        layers=stack(
            32, kv=GQA(heads=32, kv_heads=8, head_dim=128, position=RoPE(base=1e6)), feed_forward=experts(14_336, 32),
            residual=PreNorm(norm=NORM),
        ),
    ))


def twin() -> Run:
    """Four layers of width 128."""
    return twin_run(ModelSpec(
        name="mixtral-8x7b-twin", vocab=4096, width=128, context=512, final_norm=NORM,
        layers=stack(
            4, kv=GQA(heads=4, kv_heads=2, head_dim=32, position=RoPE(base=1e6)), feed_forward=experts(192, 4),
            residual=PreNorm(norm=NORM),
        ),
    ))
