"""Policies as a whole: losses, rows and states follow the dtype. ``train/test_audit.py`` reads every path."""

import pytest
import torch
from cases import model_spec, params, random_tokens

from sextant.axes.capacity import Dense, Experts
from sextant.axes.kv import GQA
from sextant.axes.numerics import BF16, FP32, FP8Blocks, FP8Delayed
from sextant.axes.stability import NormalInit, RMSNorm, SandwichNorm
from sextant.core.stream import Stream
from sextant.kernels.loss import summed_loss
from sextant.model.spec import Layer, ModelSpec

pytestmark = pytest.mark.usefixtures("half_products")

SPEC: ModelSpec = model_spec(
    Layer(kv=GQA(heads=4, kv_heads=2, head_dim=8, qk_norm=RMSNorm()), feed_forward=Dense(hidden=24)),
    Layer(
        kv=GQA(heads=4, kv_heads=2, head_dim=8),
        feed_forward=Experts(experts=4, hidden=16, shared=8),
        residual=SandwichNorm(),
    ),
    width=32,
    init=NormalInit(std=0.1),
)


def loss(numerics) -> float:
    """Of one forward, per token."""
    model, tokens_T = SPEC.build(numerics, seed=1), random_tokens(40)
    out = model(tokens_T, Stream.of_lengths([40]))
    return summed_loss(out.hidden_TD, model.head_PD, tokens_T.roll(-1)).item() / 40


@pytest.mark.parametrize("policy", params([BF16(), FP8Delayed(), FP8Blocks()]))
def test_lowered_loss_is_close_to_fp32(policy):
    lowered, full = loss(policy), loss(FP32())
    assert lowered == pytest.approx(full, rel=5e-3 if policy == BF16() else 1.5e-2)
    assert lowered != full


def test_final_rows_are_in_the_compute_dtype():
    """The head's product runs in bf16; its logits are fp32 again."""
    out = SPEC.build(BF16())(random_tokens(5), Stream.of_lengths([5]))
    assert out.hidden_TD.dtype == torch.bfloat16


def test_itemsize_and_memory_follow_the_policy():
    for numerics, dtype in ((BF16(), torch.bfloat16), (FP8Delayed(), torch.bfloat16), (FP32(), torch.float32)):
        model = SPEC.build(numerics)
        assert model.memory(1).layers[0].k.dtype == dtype
        assert numerics.itemsize == dtype.itemsize


def test_bf16_decode_follows_bf16_prefill():
    """The contract under half precision, within its digits."""
    model, tokens_T = SPEC.build(BF16(), seed=1), random_tokens(12)
    with torch.no_grad():
        whole_TP = model.logits(model(tokens_T, Stream.of_lengths([12])).hidden_TD)
        memory = model.memory(1)
        steps = [model(token, Stream.of_lengths([1], memory=memory)).hidden_TD for token in tokens_T.split(1)]
    torch.testing.assert_close(model.logits(torch.cat(steps)), whole_TP, rtol=3e-2, atol=3e-2)
