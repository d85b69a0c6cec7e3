"""MiniMax-Text-01 (2501.08313; spec minimax-01): seven lightning layers to one of softmax, a mixture in every layer.

Lightning layers have no position code; softmax layers turn half of each head. Norms stand on the residual path
(DeepNorm), and matrices start as that wants. While it trains, experts are limited and groups of devices pool their
places; the factor is not published, so 1.25 is ours. Not in this version: its growing batch.
"""

from __future__ import annotations

from sextant.axes.attention import Full, Lightning
from sextant.axes.attention.lightning import fade
from sextant.axes.capacity import Experts
from sextant.axes.kv import GQA, RoPE
from sextant.axes.routing import Auxiliary, SoftmaxTopK
from sextant.axes.routing.overflow import Pooled
from sextant.axes.stability import DeepNorm, DeepNormInit, RMSNorm
from sextant.model.spec import Layer, ModelSpec
from sextant.recipes.base import paper_run, twin_run
from sextant.train.optim import AdamW
from sextant.train.run import Batch, Run
from sextant.train.schedule import WSD

NORM = RMSNorm(eps=1e-5)
PERIOD = 8


def layers(
    depth: int, *, heads: int, kv_heads: int, head_dim: int, base: float, experts: int, hidden: int, chunk: int,
    coef: float,
) -> tuple[Layer, ...]:
    """The layer pattern at any size: every eighth layer softmax, the last one among them; slopes fade with depth."""
    softmax = GQA(heads=heads, kv_heads=kv_heads, head_dim=head_dim, position=RoPE(base=base, fraction=0.5))
    rest = {
        "feed_forward": Experts(
            experts=experts, hidden=hidden, router=SoftmaxTopK(top_k=2, normalize=True),
            balance=(Auxiliary(coef=coef),), overflow=Pooled(factor=1.25),
        ),
        "residual": DeepNorm(norm=NORM, alpha=(2 * depth) ** 0.25),
    }

    def layer(index: int) -> Layer:
        if index % PERIOD == PERIOD - 1:
            return Layer(attention=Full(), kv=softmax, **rest)
        return Layer(
            attention=Lightning(heads=heads, head_dim=head_dim, fade=fade(index, depth), chunk=chunk), **rest
        )

    return tuple(layer(index) for index in range(depth))


def paper() -> Run:
    """456.09 B parameters; 45.94 B active without the two embedding tables, as the paper counts, 48.40 B with them.

    Pre-training in its last and longest phase: 2^27 tokens a step, 11.4 T in all, of which the last 1 T decays.
    """
    model = ModelSpec(
        name="minimax-text-01", vocab=200_064, width=6144, context=8192, final_norm=NORM, init=DeepNormInit(),
        layers=layers(
            80, heads=64, kv_heads=8, head_dim=128, base=10_000.0, experts=32, hidden=9216, chunk=256, coef=0.01
        ),
    )
    schedule = WSD(warmup=500, decay=1 / 11.4, final=0.15)
    return paper_run(model, 8192, AdamW(lr=2e-4), schedule, Batch(rows=16_384, micro_rows=1), steps=84_937)


def twin() -> Run:
    """Eight layers of width 128, the last one softmax: 4.0 M parameters."""
    return twin_run(ModelSpec(
        name="minimax-text-01-twin", vocab=4096, width=128, context=512, final_norm=NORM, init=DeepNormInit(std=0.05),
        layers=layers(8, heads=4, kv_heads=2, head_dim=32, base=10_000.0, experts=4, hidden=192, chunk=64, coef=0.01),
    ))
