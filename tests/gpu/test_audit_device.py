"""The audit on a GPU, where backward runs on threads of its own and products have other names; and 8-bit weights.

``SEXTANT_FP8_DRY=1`` runs the same lines on a CPU.
"""

import os

import pytest
import torch
from cases import model_spec, params, random_tokens

from sextant import recipes
from sextant.axes.capacity import Dense, Experts
from sextant.axes.kv import GQA
from sextant.axes.numerics import BF16, FP32, FP32_PATHS, FP8Blocks, FP8Delayed, eight_bit
from sextant.axes.routing import SigmoidTopK
from sextant.axes.stability import NormalInit, hidden_matrices
from sextant.core.stream import Stream
from sextant.model.spec import Layer
from sextant.serve.generate import lower_weights
from sextant.train import audit as audits
from sextant.train.optim import AdamW

DRY = os.environ.get("SEXTANT_FP8_DRY") == "1"
GPU = "cpu" if DRY else "cuda"
pytestmark = [] if DRY else pytest.mark.gpu

SPEC = model_spec(
    Layer(kv=GQA(heads=4, kv_heads=2, head_dim=32), feed_forward=Dense(hidden=128)),
    Layer(
        kv=GQA(heads=4, kv_heads=2, head_dim=32),
        feed_forward=Experts(experts=4, hidden=128, shared=64, router=SigmoidTopK(top_k=2, bias=True)),
    ),
    width=128, vocab=256, init=NormalInit(std=0.1),
)
E4, HALF = "e4m3", "bf16"
FORMATS = [
    (FP32(), ("fp32", "fp32", "fp32")),
    (BF16(), (HALF, HALF, HALF)),
    (FP8Delayed(), (E4, "e5m2 by e4m3", HALF)),
    (FP8Blocks(), (E4, E4, E4)),
]


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize(("policy", "formats"), params(FORMATS))
def test_a_step_on_the_device_keeps_the_policy(policy, formats, moments):
    twin = recipes.get("nano").twin()
    run = twin.replace(model=SPEC, numerics=policy, optimiser=AdamW(moments=moments))
    lines = {line.tensor: line for line in audits.audit(run, SPEC.build(policy, device=GPU, seed=1))}
    assert all(lines[path].met for path in FP32_PATHS)
    assert tuple(lines[f"hidden matrices, {kind}"].met for kind in audits.KINDS) == tuple((one,) for one in formats)
    audits.require(list(lines.values()))


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_eight_bit_weights_on_the_device(kind):
    """A model with 8-bit weights is the model whose weights are the restored numbers."""
    small, plain = (SPEC.build(BF16(), device=GPU, seed=1).eval() for _ in range(2))
    with torch.no_grad():
        for name in hidden_matrices(plain):
            matrix = plain.get_parameter(name)
            matrix.copy_(eight_bit(matrix.bfloat16(), kind, torch.bfloat16).numbers())
    tokens_T = random_tokens(50, vocab=256).to(GPU)
    with torch.inference_mode():
        got, want = (
            model.logits(model(tokens_T, Stream.of_lengths([50], GPU)).hidden_TD)
            for model in (lower_weights(small, kind), lower_weights(plain))
        )
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())
