"""Rules for full experts on a CUDA device: who is admitted, values and gradients as on a CPU, rounds bit for bit."""

from dataclasses import replace

import pytest
import torch
from cases import examples, params
from torch import Tensor

from sextant.axes.capacity.stack import ExpertStack
from sextant.axes.routing import OVERFLOW, CappedRounds, Dropless, Overflow, Routing
from sextant.core.stream import Stream

pytestmark = pytest.mark.gpu
EXPERTS, WIDTH, HIDDEN, T = 6, 32, 16, 83
RULES = params(examples(OVERFLOW))


def routing(tokens: int = T) -> Routing:
    logits_TE = torch.randn(tokens, EXPERTS) - torch.arange(EXPERTS) / 3
    gates_TA, experts_TA = logits_TE.softmax(-1).topk(2)
    return Routing(logits_TE, logits_TE.softmax(-1), experts_TA, gates_TA)


def to(record: Routing, device: str) -> Routing:
    """A copy on the device, its gates a leaf."""
    tensors = {name: x.detach().to(device) for name, x in vars(record).items() if isinstance(x, Tensor)}
    moved = replace(record, **tensors)
    return replace(moved, gates_TA=moved.gates_TA.clone().requires_grad_())


def stack(device: str, seed: int = 1) -> ExpertStack:
    module, generator = ExpertStack(EXPERTS, WIDTH, HIDDEN, "swiglu"), torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return module.to(device)


def gradients(rule: Overflow, record: Routing, device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Output, then gradients by rows, gates and both stacks."""
    experts, record, generator = stack(device), to(record, device), torch.Generator().manual_seed(2)
    tokens = len(record.experts_TA)
    x_TD, weight_TD = (torch.randn(tokens, WIDTH, generator=generator).to(device) for _ in range(2))
    x_TD = x_TD.to(dtype).requires_grad_()
    y_TD, _ = rule.compute(experts, x_TD, record)
    leaves = (x_TD, record.gates_TA, *experts.parameters())
    return [y_TD.detach(), *torch.autograd.grad(y_TD, leaves, weight_TD.to(y_TD.dtype))]


def off_by(got: Tensor, want: Tensor) -> float:
    if not want.numel():
        return 0.0
    return (got.cpu().double() - want.double()).abs().max().item() / max(want.abs().max().item(), 1e-2)


@pytest.mark.parametrize("rule", RULES)
def test_admits_as_a_cpu(rule: Overflow):
    record, stream = routing(), [Stream.of_lengths([30, 0, 53], device) for device in ("cpu", "cuda")]
    want, got = (
        rule.admit(to(record, str(s.positions_T.device)), s, training=True).taken_E().cpu() for s in stream
    )
    if getattr(rule, "exempt", 0) > 0:
        assert got.sum() <= 2 * T
    else:
        assert torch.equal(got, want)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("kept", ["all", "some", "none", "no tokens"])
@pytest.mark.parametrize("rule", RULES)
def test_values_and_gradients_of_a_cpu(rule: Overflow, kept: str, dtype: torch.dtype, bound: float):
    record = routing(0 if kept == "no tokens" else T)
    masks = {"some": torch.rand(T, 2) < 0.6, "none": torch.zeros(T, 2, dtype=torch.bool)}
    record = replace(record, kept_TA=masks.get(kept))
    for g, w in zip(gradients(rule, record, "cuda", dtype), gradients(rule, record, "cpu"), strict=True):
        assert off_by(g, w) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_are_bitwise_dropless(dtype: torch.dtype):
    for _ in range(5):
        record = routing()
        want = gradients(Dropless(tile=8), record, "cuda", dtype)
        got = gradients(CappedRounds(cap=24, tile=8), record, "cuda", dtype)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
