"""MoA (2406.14909) on Vicuna 7B: every head of every layer has a span of its own, half the keys on average.

The published method takes a trained dense model, measures what each head needs, and solves for the spans; it adds no
weights. The spans that it found for this model are not printed in the paper, so a plan with the same budget stands in
here: shares of the length from an eighth to seven eighths, dealt out so that all layers and heads differ.
:mod:`sextant.lab.moa` searches one for a model that you have.
"""

from __future__ import annotations

from sextant.axes.attention import MoA
from sextant.axes.capacity import Dense
from sextant.axes.kv import GQA, RoPE
from sextant.axes.stability import PreNorm, RMSNorm
from sextant.model.spec import Layer, ModelSpec, stack
from sextant.recipes.base import published_only, twin_run
from sextant.train.run import Run

NORM = RMSNorm(eps=1e-5)
SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
"""Tokens per token of length; their mean is the published density of one half."""


def plan(layer: int, heads: int, sinks: int, block: int) -> MoA:
    """Spans of one layer: shares in turn, beginning elsewhere in every layer; no fixed part but the sinks."""
    betas = tuple(SHARES[(3 * layer + head) % len(SHARES)] for head in range(heads))
    return MoA(alpha=(0,) * heads, beta=betas, sinks=sinks, block=block)


def layers(count: int, *, heads: int, head_dim: int, hidden: int, sinks: int, block: int) -> tuple[Layer, ...]:
    """Llama's layer with spans by head."""
    return stack(
        count, attention=[plan(layer, heads, sinks, block) for layer in range(count)],
        kv=GQA(heads=heads, kv_heads=heads, head_dim=head_dim, position=RoPE()), feed_forward=Dense(hidden=hidden),
        residual=PreNorm(norm=NORM),
    )


def paper() -> Run:
    """6.74 B parameters, those of the dense model."""
    return published_only(ModelSpec(
        name="moa", vocab=32_000, width=4096, context=4096, final_norm=NORM,
        layers=layers(32, heads=32, head_dim=128, hidden=11_008, sinks=64, block=64),
    ))


def twin() -> Run:
    """Four layers of width 128, 4 sinks, blocks of 16 (spec sparse-attention 18, ``moa-tiny``)."""
    return twin_run(ModelSpec(
        name="moa-twin", vocab=4096, width=128, context=512, final_norm=NORM,
        layers=layers(4, heads=4, head_dim=32, hidden=384, sinks=4, block=16),
    ))
