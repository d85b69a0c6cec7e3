"""DeepSeek-V3 (2412.19437): V2's attention and experts, larger, with sigmoid routing that a bias balances.

Routing here is a softmax over all experts, normalised over the chosen and times 2.5: the same shapes and active
parameters, another rule. Of the balance the paper's sequence-wise loss is here, its bias is not. Neither are the module
that predicts the token after next, the limit to four groups of experts, and FP8.
"""

from __future__ import annotations

from sextant.axes.routing import Auxiliary, SoftmaxTopK
from sextant.recipes.base import paper_run, twin_run
from sextant.recipes.deepseek_v2 import SEQ_LEN, Shape, experts, growing, mla, model, small_mla, steps_of
from sextant.train.optim import AdamW
from sextant.train.run import Run
from sextant.train.schedule import WSD

BALANCE = Auxiliary(coef=1e-4, scope="sequence")
TOKENS, STABLE_TOKENS = 14.8e12, 10e12


def router(top_k: int) -> SoftmaxTopK:
    """The closest rule to a sigmoid normalised over the chosen."""
    return SoftmaxTopK(top_k=top_k, normalize=True, scale=2.5)


def paper() -> Run:
    """671.03 B parameters, 37.55 B active. The decay is linear here, where the paper's is a cosine."""
    moe = experts(256, 2048, shared=1, router=router(8), balance=BALANCE)
    spec = model("deepseek-v3", 129_280, 7168, Shape(61, 3, 18_432, moe, mla(128, 1536)))
    batch = growing(3072, 15_360, tokens=469e9)
    schedule = WSD(warmup=2000, decay=1 - STABLE_TOKENS / TOKENS)
    return paper_run(spec, SEQ_LEN, AdamW(lr=2.2e-4), schedule, batch, steps_of(batch, TOKENS))


def twin() -> Run:
    """Four layers of width 128, the first dense."""
    moe = experts(16, 64, shared=1, router=router(4), balance=BALANCE)
    return twin_run(model("deepseek-v3-twin", 4096, 128, Shape(4, 1, 512, moe, small_mla(64)), std=0.02, context=512))
