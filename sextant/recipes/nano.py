"""The smallest recipes of our own: ``nano`` for a first look, and two sizes for one GPU."""

from __future__ import annotations

from sextant.axes.attention import Full, Window
from sextant.axes.capacity import Dense
from sextant.axes.kv import GQA, RoPE
from sextant.axes.numerics import BF16
from sextant.axes.stability import NormalInit, RMSNorm
from sextant.data.spec import Data
from sextant.model.spec import ModelSpec, repeat, stack
from sextant.recipes.base import twin_run
from sextant.recipes.mai_base_1 import layers as mai_layers
from sextant.train.optim import AdamW
from sextant.train.run import Batch, Run
from sextant.train.schedule import Cosine


def nano() -> Run:
    """Four layers of width 64, windows of 64 and one full layer: trains in under half a minute."""
    return twin_run(
        ModelSpec(
            name="nano", vocab=1024, width=64, context=512, tied=True,
            layers=stack(
                4, attention=repeat(3 * [Window(window=64)] + [Full()], 4),
                kv=GQA(heads=4, kv_heads=2, head_dim=16, position=RoPE(), qk_norm=RMSNorm()),
                feed_forward=Dense(hidden=192),
            ),
        ),
        steps=300,
    )


def dense_150m() -> Run:
    """About 150 M dense parameters in bf16 for one GPU."""
    return _gpu_run(ModelSpec(
        name="dense-150m", vocab=8192, width=1024, context=4096, tied=True,
        layers=stack(
            12, kv=GQA(heads=16, kv_heads=4, head_dim=64, position=RoPE(), qk_norm=RMSNorm()),
            feed_forward=Dense(hidden=2816),
        ),
    ))


def moe_400m() -> Run:
    """MAI-Base-1's choices at about 400 M parameters, 100 M active, in bf16 for one GPU."""
    return _gpu_run(ModelSpec(
        name="moe-400m-a100m", vocab=8192, width=1024, context=4096, tied=True, init=NormalInit(std=0.03),
        layers=mai_layers(
            12, heads=16, kv_heads=4, head_dim=64, window=512, dense=2048, experts=64, top_k=4, latent=512, hidden=512,
            dropout=0.0,
        ),
    ))


def _gpu_run(model: ModelSpec) -> Run:
    return Run(
        name=model.name, model=model, data=Data(vocab=model.vocab, seq_len=2048), numerics=BF16(),
        optimiser=AdamW(lr=1e-3), schedule=Cosine(warmup=50), batch=Batch(rows=32, micro_rows=32), steps=500,
        log_every=10, eval_every=250, sample_every=250, save_every=250,
    )
