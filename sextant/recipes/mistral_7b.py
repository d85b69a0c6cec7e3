"""Mistral 7B v0.1 (2310.06825): a dense model whose every layer reads a sliding window of 4,096 tokens."""

from __future__ import annotations

from sextant.axes.attention import Window
from sextant.axes.capacity import Dense
from sextant.axes.kv import GQA, RoPE
from sextant.axes.stability import PreNorm, RMSNorm
from sextant.model.spec import ModelSpec, stack
from sextant.recipes.base import published_only, twin_run
from sextant.train.run import Run

NORM = RMSNorm(eps=1e-5)


def paper() -> Run:
    """7.24 B parameters."""
    return published_only(ModelSpec(
        name="mistral-7b", vocab=32_000, width=4096, context=32_768, final_norm=NORM,
        layers=stack(
            32, attention=Window(window=4096), kv=GQA(heads=32, kv_heads=8, head_dim=128, position=RoPE()),
            feed_forward=Dense(hidden=14_336), residual=PreNorm(norm=NORM),
        ),
    ))


def twin() -> Run:
    """Four layers, windows of 64."""
    return twin_run(ModelSpec(
        name="mistral-7b-twin", vocab=4096, width=128, context=512, final_norm=NORM,
        layers=stack(
            4, attention=Window(window=64), kv=GQA(heads=4, kv_heads=2, head_dim=32, position=RoPE()),
            feed_forward=Dense(hidden=384), residual=PreNorm(norm=NORM),
        ),
    ))
