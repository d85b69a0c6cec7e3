"""DBRX (Databricks, March 2024, and its released configuration): 16 experts of which a token meets 4, none dropped.

Gates are probabilities over their sum; queries, keys and values are clipped at 8; LayerNorms have no bias. The balance
loss is weighed for MegaBlocks' form, which is 1 under perfect balance and averaged over layers.
"""

from __future__ import annotations

from sextant.axes.capacity import Experts
from sextant.axes.kv import GQA, RoPE
from sextant.axes.routing import Auxiliary, SoftmaxTopK
from sextant.axes.stability import LayerNorm, PreNorm
from sextant.model.spec import ModelSpec, stack
from sextant.recipes.base import published_only, twin_run
from sextant.train.run import Run

NORM = LayerNorm(eps=1e-5, bias=False)
LOSS_WEIGHT, TOP_K, JITTER = 0.05, 4, 0.01


def model(name: str, vocab: int, width: int, context: int, depth: int, kv: GQA, experts: int, hidden: int) -> ModelSpec:
    """The block at any size."""
    mixture = Experts(
        experts=experts, hidden=hidden, router=SoftmaxTopK(top_k=TOP_K, normalize=True, jitter=JITTER),
        balance=(Auxiliary(coef=LOSS_WEIGHT / depth),),
    )
    layers = stack(depth, kv=kv, feed_forward=mixture, residual=PreNorm(norm=NORM))
    return ModelSpec(name=name, vocab=vocab, width=width, context=context, layers=layers, final_norm=NORM)


def heads(count: int, groups: int, width: int) -> GQA:
    """Clipped heads."""
    return GQA(heads=count, kv_heads=groups, head_dim=width, position=RoPE(base=500_000.0), clip=8.0)


def paper() -> Run:
    """131.60 B parameters, 36.47 B active; published as 132 B and 36 B."""
    return published_only(model("dbrx", 100_352, 6144, 32_768, 40, heads(48, 8, 128), 16, 10_752))


def twin() -> Run:
    """Four layers of width 128, 4 of 16 experts."""
    return twin_run(model("dbrx-twin", 4096, 128, 512, 4, heads(4, 2, 32), 16, 96), lanes=1)
