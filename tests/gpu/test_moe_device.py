"""Every router and overflow rule on a CUDA device: choices and values of a CPU, records replayed bit for bit."""

from itertools import product

import pytest
import torch
from cases import PLAIN, mixtures, model_spec, part, random_tokens
from cases import stirred as stir
from torch import Tensor

from sextant.axes.attention import MoBA
from sextant.axes.capacity import Experts
from sextant.axes.numerics import BF16, FP32, Numerics
from sextant.axes.stability import NormalInit
from sextant.core.stream import Stream
from sextant.core.trace import Trace
from sextant.model.layer import Layer
from sextant.model.transformer import Output, Transformer

pytestmark = pytest.mark.gpu
GPU = "cuda"
T, LENGTHS = 40, [17, 1, 22]
EVERY = pytest.mark.parametrize("feed_forward", [pytest.param(one, id=part(one)) for one in mixtures()])


def build(feed_forward: Experts, numerics: Numerics, device: str) -> Transformer:
    layer = Layer(attention=MoBA(block=4, top_k=3), kv=PLAIN, feed_forward=feed_forward)
    spec = model_spec(layer, layer, width=32, init=NormalInit(std=0.2))
    return stir(spec.build(numerics, seed=3)).to(device)  # type: ignore[return-value]


def run(model: Transformer, trace: Trace | None = None) -> Output:
    device = model.embedding.weight.device
    return model(random_tokens(T).to(device), Stream.of_lengths(LENGTHS, device).replaying(trace))


def near(got: Tensor, want: Tensor, tolerance: float) -> None:
    got, want = got.detach().cpu().double(), want.detach().double()
    error = (got - want).abs().max().item() / want.abs().max().item()
    assert error <= tolerance, f"off by {error:.2e} of the largest value"


@EVERY
def test_fp32_equals_the_cpu(feed_forward):
    """Outputs, and gradients by the same choices: those of the CPU, replayed on the device."""
    model, on_cpu = (build(feed_forward, FP32(), device).eval() for device in (GPU, "cpu"))
    want = run(on_cpu)
    if not getattr(feed_forward.overflow, "exempt", 0):  # sequences are exempt by draw, and devices draw apart
        near(run(model).hidden_TD, want.hidden_TD, 1e-3)
    got = run(model, want.trace().to(GPU))
    near(got.hidden_TD, want.hidden_TD, 1e-4)
    for own, out in ((model, got), (on_cpu, want)):
        own.logits(out.hidden_TD).square().mean().backward()
    for parameter, other in zip(model.parameters(), on_cpu.parameters(), strict=True):
        if other.grad is not None and other.grad.abs().max() > 1e-6:
            near(parameter.grad, other.grad, 1e-3)


@EVERY
@pytest.mark.parametrize("numerics", [FP32(), BF16()], ids=["fp32", "bf16"])
def test_own_record_changes_no_bit_in_training(feed_forward, numerics):
    """Draws are repeated by the seed; activations computed again are the same, gradients up to the order of atomics."""
    model, outs, grads, trace = build(feed_forward, numerics, GPU).train(), [], [], None
    for model.recompute in (False, False, True):
        torch.manual_seed(7)
        model.zero_grad()
        outs.append(run(model, trace))
        model.logits(outs[-1].hidden_TD).square().mean().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        trace = outs[0].trace()
    assert all(torch.equal(out.hidden_TD, outs[0].hidden_TD) and out.trace().same(trace) for out in outs)
    tolerance = 1e-5 if numerics.compute is None else 2e-2
    for own, (name, gradient) in product(grads[1:], grads[0].items()):
        if gradient.abs().max() > 1e-6:
            near(own[name], gradient.cpu(), tolerance)


@EVERY
def test_counts_add_up(feed_forward):
    for training in (True, False):
        for routing in run(build(feed_forward, BF16(), GPU).train(training)).routings.values():
            assert int(routing.taken_E().sum()) + routing.dropped() == int(routing.counts_E().sum())
            assert routing.gates_TA.isfinite().all() and routing.gates_TA.dtype == torch.float32


def test_a_record_goes_through_a_file(tmp_path):
    model = build(mixtures()[0], BF16(), GPU).eval()
    out = run(model)
    out.trace().save(tmp_path / "trace.safetensors")
    again = run(model, Trace.load(tmp_path / "trace.safetensors").to(GPU))
    assert torch.equal(again.hidden_TD, out.hidden_TD)
