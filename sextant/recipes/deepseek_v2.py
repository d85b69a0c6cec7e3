"""DeepSeek-V2 and V2-Lite (2405.04434): latent attention, the first layer dense, fine-grained and shared experts after.

``paper`` and ``paper_lite`` are the pre-training runs at 4,096 tokens; ``extended`` gives a model its long context, as
released. V2 lets a token meet experts of three devices out of eight, balances experts, devices and communication within
each sequence, and drops what a device cannot take while it trains; V2-Lite does the first of the losses alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from sextant.axes.capacity import Dense, Experts
from sextant.axes.kv import MLA, RoPE, YaRNScaling
from sextant.axes.routing import AnyBalance, AnyRouter, Auxiliary, Communication, Device, Groups, SoftmaxTopK
from sextant.axes.routing.overflow import AnyOverflow, DeviceCapacity, Dropless
from sextant.axes.stability import NormalInit, PreNorm, RMSNorm
from sextant.model.spec import Layer, ModelSpec, stack
from sextant.recipes.base import paper_run, twin_run
from sextant.train.optim import AdamW
from sextant.train.run import Batch, Run
from sextant.train.schedule import Steps

NORM = RMSNorm(eps=1e-6)
SEQ_LEN = 4096
STD = 0.006
LITE_BALANCE = (Auxiliary(coef=0.001, scope="sequence"),)
DROPLESS = Dropless()


@dataclass(frozen=True)
class Shape:
    """What sets the family's sizes apart; ``dense_layers`` come first."""

    layers: int
    dense_layers: int
    dense: int
    experts: Experts
    kv: MLA

    def stack(self) -> tuple[Layer, ...]:
        """All layers, norms before."""
        sparse = self.layers - self.dense_layers
        feed_forward = self.dense_layers * [Dense(hidden=self.dense)] + sparse * [self.experts]
        return stack(self.layers, kv=self.kv, feed_forward=feed_forward, residual=PreNorm(norm=NORM))


def mla(heads: int, q_rank: int | None) -> MLA:
    """Latent attention as in every paper of the family: ranks 1,536 and 512, heads of 128 and 64 rotary channels."""
    return MLA(heads=heads, rank=512, nope_dim=128, rope_dim=64, v_dim=128, q_rank=q_rank)


def small_mla(q_rank: int | None) -> MLA:
    """The same proportions for a twin."""
    return MLA(heads=4, rank=32, nope_dim=32, rope_dim=16, v_dim=32, q_rank=q_rank)


def experts(
    count: int, hidden: int, *, shared: int, router: AnyRouter, balance: tuple[AnyBalance, ...],
    overflow: AnyOverflow = DROPLESS,
) -> Experts:
    """``count`` experts and ``shared`` ones of the same width, which every token meets."""
    return Experts(
        experts=count, hidden=hidden, shared=shared * hidden, router=router, balance=balance, overflow=overflow
    )


def limited(count: int, hidden: int, *, top_k: int, scale: float, devices: int, kept: int) -> Experts:
    """V2's own: experts spread over ``devices`` of which a token reaches ``kept``; two shared ones."""
    router = SoftmaxTopK(top_k=top_k, scale=scale, groups=Groups(count=devices, kept=kept))
    balance = (
        Auxiliary(coef=0.003, scope="sequence"), Device(coef=0.05, devices=devices, scope="sequence"),
        Communication(coef=0.02, devices=devices, limit=kept, scope="sequence"),
    )
    overflow = DeviceCapacity(devices=devices, factor=1.0, exempt=0.1)
    return experts(count, hidden, shared=2, router=router, balance=balance, overflow=overflow)


def model(name: str, vocab: int, width: int, shape: Shape, std: float = STD, context: int = SEQ_LEN) -> ModelSpec:
    """A member of the family."""
    return ModelSpec(
        name=name, vocab=vocab, width=width, context=context, final_norm=NORM, layers=shape.stack(),
        init=NormalInit(std=std),
    )


def extended(spec: ModelSpec, mscale: float) -> ModelSpec:
    """The model with 40 times the context, by YaRN over the rotary channels (spec deepseek-v3 9)."""
    scaling = YaRNScaling(factor=40.0, original=SEQ_LEN, mscale=mscale, mscale_all_dim=mscale)
    position = RoPE(layout="interleaved", scaling=scaling)
    layers = tuple(layer.replace(kv=layer.projections.replace(position=position)) for layer in spec.layers)
    return spec.replace(layers=layers, context=40 * SEQ_LEN)


def growing(first: int, last: int, tokens: float, micro_rows: int = 1, stages: int = 4) -> Batch:
    """A batch that grows from ``first`` to ``last`` rows in equal stages over the first ``tokens`` tokens."""
    ramp, step = [], 0.0
    for stage in range(stages):
        rows = first + stage * (last - first) // stages
        step += tokens / stages / (rows * SEQ_LEN)
        ramp.append((round(step), rows))
    return Batch(rows=last, micro_rows=micro_rows, ramp=tuple(ramp))


def steps_of(batch: Batch, tokens: float) -> int:
    """Steps that this many tokens take, the growth included."""
    step, seen = 0, 0
    for until, rows in batch.ramp:
        step, seen = until, seen + (until - step) * rows * SEQ_LEN
    return step + round((tokens - seen) / (batch.rows * SEQ_LEN))


def paper() -> Run:
    """235.74 B parameters, 21.38 B active."""
    moe = limited(160, 1536, top_k=6, scale=16.0, devices=8, kept=3)
    spec = model("deepseek-v2", 102_400, 5120, Shape(60, 1, 12_288, moe, mla(128, 1536)))
    batch = growing(2304, 9216, tokens=225e9)
    schedule = Steps(warmup=2000, final=0.0, at=(0.6, 0.9))
    return paper_run(spec, SEQ_LEN, AdamW(lr=2.4e-4), schedule, batch, steps_of(batch, 8.1e12))


def paper_lite() -> Run:
    """15.71 B parameters, 2.66 B active."""
    moe = experts(64, 1408, shared=2, router=SoftmaxTopK(top_k=6), balance=LITE_BALANCE)
    spec = model("deepseek-v2-lite", 102_400, 2048, Shape(27, 1, 10_944, moe, mla(16, None)))
    batch = Batch(rows=4608, micro_rows=1)
    schedule = Steps(warmup=2000, final=0.0, at=(0.8, 0.9))
    return paper_run(spec, SEQ_LEN, AdamW(lr=4.2e-4), schedule, batch, steps_of(batch, 5.7e12))


def twin() -> Run:
    """Four layers of width 128, the first dense; queries by way of a latent; experts of two devices out of four."""
    moe = limited(16, 64, top_k=4, scale=4.0, devices=4, kept=2)
    spec = model("deepseek-v2-twin", 4096, 128, Shape(4, 1, 512, moe, small_mla(64)), std=0.02, context=512)
    return twin_run(spec, lanes=1)


def twin_lite() -> Run:
    """Four layers of width 128, the first dense."""
    moe = experts(16, 64, shared=2, router=SoftmaxTopK(top_k=4), balance=LITE_BALANCE)
    spec = model("deepseek-v2-lite-twin", 4096, 128, Shape(4, 1, 512, moe, small_mla(None)), std=0.02, context=512)
    return twin_run(spec)
