"""InfLLM-V2 at 8 B (2509.24663; MiniCPM4): a dense model that reads 96 blocks of 64 tokens where its context is long.

Published: 32 query heads over 2 of width 128, all numbers of the sparse attention, 5 B tokens of up to 32,768 to adapt,
learning rate 3e-4 to 2.75e-4. The other shapes are ours, chosen to reach the published 8 B. MiniCPM's scaled residuals
and embeddings and its stretched rotary code are not here.
"""

from __future__ import annotations

from sextant.axes.attention import InfLLMV2
from sextant.axes.capacity import Dense
from sextant.axes.kv import GQA, RoPE
from sextant.model.spec import ModelSpec, stack
from sextant.recipes.base import paper_run, twin_run
from sextant.train.optim import AdamW
from sextant.train.run import Batch, Run
from sextant.train.schedule import Cosine

TOKENS, SEQ_LEN, ROWS = 5e9, 32_768, 64


def paper() -> Run:
    """8.18 B parameters; pooling 32 by 16, block 64, 64 chosen and 32 local ones, dense up to 8,192: the defaults."""
    model = ModelSpec(
        name="infllm-v2-8b", vocab=73_448, width=4096, context=SEQ_LEN,
        layers=stack(
            32, attention=InfLLMV2(), kv=GQA(heads=32, kv_heads=2, head_dim=128, position=RoPE()),
            feed_forward=Dense(hidden=16_384),
        ),
    )
    schedule = Cosine(warmup=20, final=2.75 / 3)
    return paper_run(
        model, SEQ_LEN, AdamW(lr=3e-4), schedule, Batch(rows=ROWS, micro_rows=1), round(TOKENS / (ROWS * SEQ_LEN))
    )


def twin() -> Run:
    """Four layers of width 128: pooling 8 by 4, block 16, 4 chosen and 2 local blocks, dense up to 128 tokens."""
    sparse = InfLLMV2(length=8, stride=4, block=16, top_k=4, window=32, dense_len=128)
    return twin_run(ModelSpec(
        name="infllm-v2-8b-twin", vocab=4096, width=128, context=512,
        layers=stack(
            4, attention=sparse, kv=GQA(heads=4, kv_heads=2, head_dim=32), feed_forward=Dense(hidden=384),
        ),
    ))
