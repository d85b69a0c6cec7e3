"""DeepSeek-V3 (2412.19437): V2's attention and experts, larger, with sigmoid routing that a bias balances.

A token meets experts of four groups out of eight; the bias steers the choice and is moved after each step; a small loss
keeps single sequences from going astray; one module predicts the token after next. Products are in FP8, scaled by tile
and block; the twin computes in fp32.
"""

from __future__ import annotations

from sextant.axes.numerics import FP8Blocks
from sextant.axes.routing import Auxiliary, Bias, Groups, SigmoidTopK
from sextant.model.mtp import MTP, LossWeight
from sextant.recipes.base import paper_run, twin_run
from sextant.recipes.deepseek_v2 import SEQ_LEN, Shape, experts, growing, mla, model, small_mla, steps_of
from sextant.train.optim import AdamW
from sextant.train.run import Run
from sextant.train.schedule import WSD

TOKENS, STABLE_TOKENS, BIAS_TOKENS = 14.8e12, 10e12, 14.3e12
SEQUENCE = Auxiliary(coef=1e-4, scope="sequence", counts="unbiased")
"""Equation 18 counts the best affinities, not the choice that bias and groups make of them."""


def router(top_k: int, groups: int, kept: int) -> SigmoidTopK:
    """Affinities over their sum, times 2.5; groups are judged by their two best."""
    return SigmoidTopK(top_k=top_k, scale=2.5, groups=Groups(count=groups, kept=kept, score="top2"))


def paper() -> Run:
    """671.03 B parameters, 37.55 B active, and 11.61 B of the prediction module. The decay is linear here, where the
    paper's is a cosine.
    """
    batch = growing(3072, 15_360, tokens=469e9)
    steps = steps_of(batch, TOKENS)
    balance = (Bias(rate=1e-3, until=steps_of(batch, BIAS_TOKENS) / steps), SEQUENCE)
    moe = experts(256, 2048, shared=1, router=router(8, groups=8, kept=4), balance=balance)
    mtp = MTP(weight=LossWeight(first=0.3, later=0.1, until=steps_of(batch, STABLE_TOKENS) / steps))
    spec = model("deepseek-v3", 129_280, 7168, Shape(61, 3, 18_432, moe, mla(128, 1536))).replace(mtp=mtp)
    schedule = WSD(warmup=2000, decay=1 - STABLE_TOKENS / TOKENS)
    return paper_run(spec, SEQ_LEN, AdamW(lr=2.2e-4, moments="bf16"), schedule, batch, steps).replace(
        numerics=FP8Blocks()
    )


def twin() -> Run:
    """Four layers of width 128, the first dense; the bias moves faster, as a run of hundreds of steps wants."""
    balance = (Bias(rate=0.005), SEQUENCE)
    moe = experts(16, 64, shared=1, router=router(4, groups=4, kept=2), balance=balance)
    spec = model("deepseek-v3-twin", 4096, 128, Shape(4, 1, 512, moe, small_mla(64)), std=0.02, context=512)
    return twin_run(spec.replace(mtp=MTP(weight=LossWeight(until=2 / 3))))
