"""NSA's 27 B model (2502.11089, section 4.1): compression, selection and window with gates, over fine-grained experts.

Published: 30 layers of width 2,560, 64 heads over 4 groups, widths 192 and 128, 72 routed and 2 shared experts of
which 6 are met, a dense first layer, all numbers of NSA itself, 270 B tokens of 8,192. Not published, so ours:
vocabulary, width of the experts (chosen so that the total is 27 B), the dense layer's, phi's, the rotary base, the
router's rule, learning rate and batch. With these shapes a token meets 5.5 B parameters, where the paper prints 3 B:
2.1 B of them are attention, by published shapes alone 1.9 B.
"""

from __future__ import annotations

from sextant.axes.attention import NSA, MLPPhi
from sextant.axes.capacity import Dense, Experts
from sextant.axes.kv import GQA
from sextant.axes.routing import Auxiliary, SoftmaxTopK
from sextant.model.spec import Layer, ModelSpec, stack
from sextant.recipes.base import paper_run, twin_run
from sextant.train.optim import AdamW
from sextant.train.run import Batch, Run
from sextant.train.schedule import Cosine

TOKENS, SEQ_LEN, ROWS = 270e9, 8192, 512


def layers(count: int, nsa: NSA, kv: GQA, dense: int, experts: Experts) -> tuple[Layer, ...]:
    """NSA in every layer, experts in all but the first."""
    return stack(count, attention=nsa, kv=kv, feed_forward=[Dense(hidden=dense)] + [experts] * (count - 1))


def experts(routed: int, hidden: int, top_k: int) -> Experts:
    """Fine-grained experts with two shared ones."""
    balance = (Auxiliary(coef=1e-3, scope="sequence"),)
    router = SoftmaxTopK(top_k=top_k, normalize=True)
    return Experts(experts=routed, hidden=hidden, router=router, shared=2 * hidden, balance=balance)


def paper() -> Run:
    """27 B parameters; l 32, d 16, l' 64, n 16 with 1 first and 2 local blocks, w 512: the defaults of NSA."""
    kv = GQA(heads=64, kv_heads=4, head_dim=192, v_head_dim=128)
    model = ModelSpec(
        name="nsa-27b", vocab=129_280, width=2560, context=32_768,
        layers=layers(30, NSA(phi=MLPPhi(hidden=192)), kv, 12_288, experts(72, 1472, 6)),
    )
    steps = round(TOKENS / (ROWS * SEQ_LEN))
    return paper_run(model, SEQ_LEN, AdamW(lr=3e-4), Cosine(warmup=2000), Batch(rows=ROWS, micro_rows=1), steps)


def twin() -> Run:
    """Four layers of width 128: l 8, d 4, l' 16, n 4, w 32; four heads over one group, values narrower than keys."""
    nsa = NSA(length=8, stride=4, block=16, top_k=4, window=32, phi=MLPPhi(hidden=32))
    kv = GQA(heads=4, kv_heads=1, head_dim=32, v_head_dim=24)
    return twin_run(ModelSpec(
        name="nsa-27b-twin", vocab=4096, width=128, context=512, layers=layers(4, nsa, kv, 384, experts(16, 64, 4)),
    ))
