"""InfLLM (2402.04617; spec sparse-attention 6, 18): Llama 3 8B reads a million tokens by a memory of blocks, untrained.

The settings are those released for Llama 3: sinks 128, window 4,096, 16 blocks of 128, 4 keys to represent a block, 512
queries that choose as one. Training is the base's own: the memory works in evaluation and decoding only.
"""

from __future__ import annotations

from sextant.axes.attention import InfLLM
from sextant.model.spec import ModelSpec
from sextant.recipes import llama_3_8b
from sextant.recipes.base import published_only, twin_run
from sextant.train.run import Batch, Run


def paper() -> Run:
    """8.03 B parameters, none of them new; 1 M tokens of context, the longest published test."""
    memory = InfLLM(block=128, sinks=128, window=4096, top_k=16, representatives=4, exec_block=512)
    return published_only(_remembering(llama_3_8b.paper().model, memory, "infllm", 2**20))


def twin() -> Run:
    """Trained on 128 tokens, meant to be read at 1,024: window 64, 4 blocks of 16."""
    memory = InfLLM(block=16, sinks=16, window=64, top_k=4, representatives=2, exec_block=16)
    run = twin_run(_remembering(llama_3_8b.twin().model, memory, "infllm-twin", 1024))
    return run.replace(data=run.data.replace(seq_len=128), batch=Batch(rows=16, micro_rows=16))


def _remembering(base: ModelSpec, memory: InfLLM, name: str, context: int) -> ModelSpec:
    return base.replace(
        name=name, context=context, layers=tuple(layer.replace(attention=memory) for layer in base.layers)
    )
