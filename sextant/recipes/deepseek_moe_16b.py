"""DeepSeekMoE 16B (2401.06066): fine-grained experts beside shared ones, first layer dense, plain multi-head attention.

Gates are raw probabilities. The balance loss looks at each sequence, as the released configuration says.
"""

from __future__ import annotations

from typing import Any

from sextant.axes.capacity import Dense, Experts
from sextant.axes.kv import GQA, RoPE
from sextant.axes.routing import SoftmaxTopK
from sextant.axes.stability import NormalInit, PreNorm
from sextant.model.spec import ModelSpec, stack
from sextant.recipes.base import paper_run, twin_run
from sextant.recipes.deepseek_v2 import LITE_BALANCE, NORM, SEQ_LEN, STD, experts
from sextant.train.optim import AdamW
from sextant.train.run import Batch, Run
from sextant.train.schedule import Steps


def model(
    name: str, vocab: int, width: int, depth: int, heads: int, dense: int, moe: Experts, **more: Any
) -> ModelSpec:
    """A dense layer, then mixtures; heads share the width evenly."""
    kv = GQA(heads=heads, kv_heads=heads, head_dim=width // heads, position=RoPE())
    feed_forward = [Dense(hidden=dense)] + (depth - 1) * [moe]
    layers = stack(depth, kv=kv, feed_forward=feed_forward, residual=PreNorm(norm=NORM))
    return ModelSpec(name=name, vocab=vocab, width=width, layers=layers, final_norm=NORM, **more)


def paper() -> Run:
    """16.38 B parameters, 2.83 B active."""
    moe = experts(64, 1408, shared=2, router=SoftmaxTopK(top_k=6), balance=LITE_BALANCE)
    spec = model(
        "deepseek-moe-16b", 102_400, 2048, 28, 16, 10_944, moe, context=SEQ_LEN, init=NormalInit(std=STD)
    )
    schedule = Steps(warmup=2000, final=0.0, at=(0.8, 0.9))
    return paper_run(spec, SEQ_LEN, AdamW(lr=4.2e-4), schedule, Batch(rows=4608, micro_rows=1), steps=106_449)


def twin() -> Run:
    """Four layers of width 128."""
    moe = experts(16, 64, shared=2, router=SoftmaxTopK(top_k=4), balance=LITE_BALANCE)
    return twin_run(model("deepseek-moe-16b-twin", 4096, 128, 4, 4, 384, moe, context=512))
