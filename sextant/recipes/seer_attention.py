"""SeerAttention (2410.13276) on Llama 3.1 8B and SeerAttention-R (2506.08889) on Qwen3 8B: gates beside a frozen model.

Gate shapes, losses and training settings are the published ones (spec sparse-attention 8, 18). Nothing but the gates is
trained, from the weights that ``init_from`` names; the model reads everything meanwhile, and what the gates choose in
evaluation and decoding. Both twins begin with the twin of ``llama-3-8b``, which has to be trained first.
"""

from __future__ import annotations

from sextant.axes.attention import Seer, SeerR
from sextant.axes.attention.seer import Budget, Density, GatedPattern
from sextant.axes.capacity import Dense
from sextant.axes.kv import GQA, Llama3Scaling, RoPE
from sextant.axes.stability import RMSNorm
from sextant.model.spec import ModelSpec, stack
from sextant.recipes import llama_3_8b
from sextant.recipes.base import paper_run, twin_run
from sextant.train.optim import AdamW
from sextant.train.run import Batch, Run
from sextant.train.schedule import Cosine

GATES = "*.pattern.gate.*"


def paper() -> Run:
    """Llama 3.1 8B, 131,072 tokens of context, with 50.3 M parameters of gates; 64 K tokens x 16 rows x 500 steps.

    One tenth of the blocks is read; the released scripts offer thresholds from 5e-4 to 5e-3 as well.
    """
    base = llama_3_8b.paper().model
    position = RoPE(base=500_000.0, scaling=Llama3Scaling(factor=8.0, original=8192))
    kv = base.layers[0].projections.replace(position=position)
    gate = Seer(block=64, rule=Density(share=0.1), loss_scale=10.0)
    model = _gated(base, gate, "seer-attention").replace(context=131_072)
    model = model.replace(layers=tuple(layer.replace(kv=kv) for layer in model.layers))
    return _distilled(model, 65_536, 500, "runs/llama-3.1-8b")


def paper_r() -> Run:
    """Qwen3 8B with 33.0 M parameters of gates; 32 K tokens x 16 rows x 800 steps; 4,096 tokens are read."""
    norm = RMSNorm(eps=1e-6)
    model = ModelSpec(
        name="seer-attention-r", vocab=151_936, width=4096, context=40_960, final_norm=norm,
        layers=stack(
            36, attention=SeerR(block=64, width=128, rule=Budget(tokens=4096), loss_scale=10.0),
            kv=GQA(heads=32, kv_heads=8, head_dim=128, position=RoPE(base=1_000_000.0), qk_norm=norm),
            feed_forward=Dense(hidden=12_288),
        ),
    )
    return _distilled(model, 32_768, 800, "runs/qwen3-8b")


def twin() -> Run:
    """Half of the blocks of 16; queries of a block choose as one, as published: not causal inside a block."""
    gate = Seer(block=16, rule=Density(share=0.5), loss_scale=10.0)
    return _distilled_twin(_gated(llama_3_8b.twin().model, gate, "seer-attention-twin"))


def twin_r() -> Run:
    """64 tokens of a sequence are read, in blocks of 16."""
    gate = SeerR(block=16, width=32, rule=Budget(tokens=64), loss_scale=10.0)
    return _distilled_twin(_gated(llama_3_8b.twin().model, gate, "seer-attention-r-twin"))


def _gated(base: ModelSpec, gate: GatedPattern, name: str) -> ModelSpec:
    return base.replace(name=name, layers=tuple(layer.replace(attention=gate) for layer in base.layers))


def _distilled(model: ModelSpec, seq_len: int, steps: int, base: str) -> Run:
    batch = Batch(rows=16, micro_rows=1)
    run = paper_run(model, seq_len, AdamW(lr=1e-3), Cosine(warmup=20), batch, steps)
    return run.replace(init_from=base, train_only=GATES)


def _distilled_twin(model: ModelSpec) -> Run:
    run = twin_run(model, steps=200, lr=3e-3)
    return run.replace(init_from="runs/llama-3-8b-twin", train_only=GATES)
