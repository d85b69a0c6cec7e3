"""gpt-oss 20B (OpenAI, August 2025): windows of 128 and full attention in turn, a learned sink in every head.

The attention is the published one. The experts are plain: the original's have biases and a clamped, shifted SwiGLU, its
router and its output projection a bias each, which are 7 M of 20.9 B parameters.
"""

from __future__ import annotations

from sextant.axes.attention import LearnedSink
from sextant.axes.capacity import Experts
from sextant.axes.kv import GQA, RoPE, YaRNScaling
from sextant.axes.routing import Auxiliary, SoftmaxTopK
from sextant.axes.stability import PreNorm, RMSNorm
from sextant.model.spec import Layer, ModelSpec, repeat, stack
from sextant.recipes.base import published_only, twin_run
from sextant.train.run import Run

NORM = RMSNorm(eps=1e-5)


def layers(count: int, *, window: int, kv: GQA, experts: int, top_k: int, hidden: int) -> tuple[Layer, ...]:
    """A local layer, then a global one; gates are a softmax over the chosen experts."""
    mixture = Experts(
        experts=experts, hidden=hidden, router=SoftmaxTopK(top_k=top_k, normalize=True), balance=(Auxiliary(coef=1e-3),)
    )
    attention = repeat([LearnedSink(window=window), LearnedSink()], count)
    return stack(count, attention=attention, kv=kv, feed_forward=mixture, residual=PreNorm(norm=NORM))


def paper() -> Run:
    """20.91 B parameters, 4.19 B active with both ends (3.61 B without the embedding, as published)."""
    scaling = YaRNScaling(factor=32.0, original=4096, truncate=False)
    kv = GQA(heads=64, kv_heads=8, head_dim=64, bias=True, position=RoPE(base=150_000.0, scaling=scaling))
    return published_only(ModelSpec(
        name="gpt-oss-20b", vocab=201_088, width=2880, context=131_072, final_norm=NORM,
        layers=layers(24, window=128, kv=kv, experts=32, top_k=4, hidden=2880),
    ))


def twin() -> Run:
    """Four layers of width 128, windows of 32, 4 of 16 experts."""
    kv = GQA(heads=8, kv_heads=2, head_dim=16, bias=True, position=RoPE(base=150_000.0))
    return twin_run(ModelSpec(
        name="gpt-oss-20b-twin", vocab=4096, width=128, context=512, tied=True, final_norm=NORM,
        layers=layers(4, window=32, kv=kv, experts=16, top_k=4, hidden=96),
    ))
