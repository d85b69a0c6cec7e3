"""Gemma 3, text towers (2503.19786): five local layers to one global, both rotary with their own base.

Norms store their gain as a difference from 1 and stand on both sides of every sublayer; embeddings are scaled by
sqrt(D); the feed-forward is GELU-gated. The 27B scales its scores by (D / H)^-1/2 instead of the head width.
"""

from __future__ import annotations

import math

from sextant.axes.attention import Full, Window
from sextant.axes.capacity import Dense
from sextant.axes.kv import GQA, LinearScaling, RoPE
from sextant.axes.stability import RMSNorm, SandwichNorm
from sextant.model.spec import ModelSpec, repeat, stack
from sextant.recipes.base import published_only, twin_run
from sextant.train.run import Run

NORM = RMSNorm(eps=1e-6, unit_offset=True)
PERIOD = 6


def model(
    name: str, *, layers: int, width: int, heads: int, kv_heads: int, head_dim: int, hidden: int, window: int,
    vocab: int = 262_144, context: int = 131_072, stretch: float | None = 8.0, score_width: int | None = None,
) -> ModelSpec:
    """Any size; ``stretch`` divides positions in the global layers, scores are scaled by ``score_width ** -0.5``."""
    scaling = LinearScaling(factor=stretch) if stretch else None

    def kv(position: RoPE) -> GQA:
        scale = (score_width or head_dim) ** -0.5
        return GQA(heads=heads, kv_heads=kv_heads, head_dim=head_dim, position=position, qk_norm=NORM, scale=scale)

    local, global_ = kv(RoPE(base=10_000.0)), kv(RoPE(base=1e6, scaling=scaling))
    return ModelSpec(
        name=name, vocab=vocab, width=width, context=context, tied=True, embedding_scale=math.sqrt(width),
        final_norm=NORM,
        layers=stack(
            layers,
            attention=repeat((PERIOD - 1) * [Window(window=window)] + [Full()], layers),
            kv=repeat((PERIOD - 1) * [local] + [global_], layers),
            feed_forward=Dense(hidden=hidden, activation="geglu_tanh"),
            residual=SandwichNorm(norm=NORM),
        ),
    )


def paper_1b() -> Run:
    """The 1B, trained for 32 k tokens and not stretched."""
    return published_only(model(
        "gemma-3-1b", layers=26, width=1152, heads=4, kv_heads=1, head_dim=256, hidden=6912, window=512,
        context=32_768, stretch=None,
    ))


def paper_4b() -> Run:
    """The 4B."""
    return published_only(model(
        "gemma-3-4b", layers=34, width=2560, heads=8, kv_heads=4, head_dim=256, hidden=10_240, window=1024,
    ))


def paper_12b() -> Run:
    """The 12B."""
    return published_only(model(
        "gemma-3-12b", layers=48, width=3840, heads=16, kv_heads=8, head_dim=256, hidden=15_360, window=1024,
    ))


def paper_27b() -> Run:
    """The 27B."""
    return published_only(model(
        "gemma-3-27b", layers=62, width=5376, heads=32, kv_heads=16, head_dim=128, hidden=21_504, window=1024,
        score_width=5376 // 32,
    ))


def twin() -> Run:
    """Six layers of width 128, windows of 32."""
    return twin_run(model(
        "gemma-3-twin", layers=6, width=128, heads=4, kv_heads=2, head_dim=32, hidden=256, window=32, vocab=4096,
        context=512,
    ))
