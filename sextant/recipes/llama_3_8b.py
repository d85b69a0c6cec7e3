"""Llama 3 8B (2407.21783): the dense control. Full attention, grouped heads, rotary base 500,000, SwiGLU."""

from __future__ import annotations

from sextant.axes.capacity import Dense
from sextant.axes.kv import GQA, RoPE
from sextant.axes.stability import PreNorm, RMSNorm
from sextant.model.spec import ModelSpec, stack
from sextant.recipes.base import published_only, twin_run
from sextant.train.run import Run

NORM = RMSNorm(eps=1e-5)


def paper() -> Run:
    """8.03 B parameters, 8,192 tokens of context."""
    return published_only(ModelSpec(
        name="llama-3-8b", vocab=128_256, width=4096, context=8192, final_norm=NORM,
        layers=stack(
            32, kv=GQA(heads=32, kv_heads=8, head_dim=128, position=RoPE(base=500_000.0)),
            feed_forward=Dense(hidden=14_336), residual=PreNorm(norm=NORM),
        ),
    ))


def twin() -> Run:
    """Four layers of width 128."""
    return twin_run(ModelSpec(
        name="llama-3-8b-twin", vocab=4096, width=128, context=512, final_norm=NORM,
        layers=stack(
            4, kv=GQA(heads=4, kv_heads=2, head_dim=32, position=RoPE(base=500_000.0)),
            feed_forward=Dense(hidden=384), residual=PreNorm(norm=NORM),
        ),
    ))
