"""MoBA on Llama 3.1 8B with a million tokens (2502.13189, section 3.3): the last three layers stay full attention.

The paper trains on to 1 M tokens in steps and then turns MoBA on for 100 B tokens; nothing is added to the weights.
"""

from __future__ import annotations

from sextant.axes.attention import Full, MoBA
from sextant.axes.capacity import Dense
from sextant.axes.kv import GQA, Llama3Scaling, RoPE
from sextant.axes.stability import PreNorm, RMSNorm
from sextant.data.spec import Data
from sextant.model.spec import Layer, ModelSpec, stack
from sextant.recipes.base import paper_run, twin_run
from sextant.train.optim import AdamW
from sextant.train.run import Batch, Run
from sextant.train.schedule import Cosine

NORM = RMSNorm(eps=1e-5)
CONTEXT = 2**20


def layers(count: int, full_last: int, moba: MoBA, kv: GQA, hidden: int) -> tuple[Layer, ...]:
    """MoBA below, full attention in the last layers, which keeps gradient dense where few tokens carry loss."""
    return stack(
        count, attention=[moba] * (count - full_last) + [Full()] * full_last, kv=kv,
        feed_forward=Dense(hidden=hidden), residual=PreNorm(norm=NORM),
    )


def paper() -> Run:
    """8.03 B parameters, none of them MoBA's; blocks of 4,096, the own and 11 others read."""
    position = RoPE(base=500_000.0, scaling=Llama3Scaling(factor=8.0, original=8192))
    model = ModelSpec(
        name="moba-llama-8b", vocab=128_256, width=4096, context=CONTEXT, final_norm=NORM,
        layers=layers(
            32, 3, MoBA(block=4096, top_k=12), GQA(heads=32, kv_heads=8, head_dim=128, position=position), 14_336
        ),
    )
    return paper_run(model, CONTEXT, AdamW(lr=3e-5), Cosine(warmup=100), Batch(rows=4, micro_rows=1), steps=23_842)


def twin() -> Run:
    """Four layers of width 128 on 512 tokens; blocks of 32, the own and two others read; the last layer full."""
    kv = GQA(heads=4, kv_heads=2, head_dim=32, position=RoPE(base=500_000.0))
    run = twin_run(ModelSpec(
        name="moba-llama-8b-twin", vocab=4096, width=128, context=512, final_norm=NORM,
        layers=layers(4, 1, MoBA(block=32, top_k=3), kv, 384),
    ))
    return run.replace(data=Data(vocab=4096, seq_len=512), batch=Batch(rows=4, micro_rows=4))
