"""Balance losses: known values, gradients, scopes, packed sequences, micro-batches."""

import math

import pytest
import torch
from cases import close, examples, params
from torch import Tensor

from sextant.axes.routing import BALANCE, Auxiliary, Routing, ZLoss
from sextant.core.stream import Stream

E, A = 6, 2


def routing_of(logits_TE: Tensor) -> Routing:
    probs_TE = logits_TE.softmax(-1)
    experts_TA = logits_TE.detach().sort(descending=True, stable=True).indices[:, :A]
    return Routing(logits_TE, probs_TE, experts_TA, probs_TE.gather(1, experts_TA))


def random_routing(tokens: int) -> Routing:
    return routing_of(torch.randn(tokens, E, dtype=torch.float64, requires_grad=True))


def loss(spec, routing: Routing, lengths: list[int] | None = None, counts_E: Tensor | None = None) -> Tensor:
    tokens = len(routing.logits_TE)
    counts_E = routing.counts_E() if counts_E is None else counts_E
    return spec.loss(routing, Stream.of_lengths(lengths or [tokens]), counts_E, tokens)


SCOPES = pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
EVERY = pytest.mark.parametrize("spec", params(examples(BALANCE)))


@EVERY
def test_scalar_in_fp32_or_better_with_a_gradient(spec):
    routing = random_routing(12)
    value = loss(spec, routing, [5, 7])
    assert value.shape == () and value.dtype == torch.float64
    (grad,) = torch.autograd.grad(value, routing.logits_TE)
    assert grad.isfinite().all() and grad.abs().sum() > 0


@EVERY
def test_gradient_equals_finite_differences(spec):
    """Away from ties the choice is a constant, as the loss says."""
    logits_TE = (3 * torch.randn(5, E, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(spec, routing_of(z), [2, 3]), (logits_TE,))


@SCOPES
def test_uniform_routing_costs_coef(scope):
    """Every expert receives the same and is as probable: coef, whatever A is."""
    probs_TE = torch.full((E, E), 1 / E, dtype=torch.float64)
    experts_TA = torch.stack([torch.arange(E), (torch.arange(E) + 1) % E], dim=1)
    routing = Routing(probs_TE.log(), probs_TE, experts_TA, probs_TE[:, :A])
    assert float(loss(Auxiliary(coef=0.3, scope=scope), routing)) == pytest.approx(0.3)


@SCOPES
def test_collapse_costs_coef_times_experts_over_chosen(scope):
    logits_TE = torch.full((8, E), -50.0, dtype=torch.float64)
    logits_TE[:, :A] = 50.0
    assert float(loss(Auxiliary(coef=0.3, scope=scope), routing_of(logits_TE), [3, 5])) == pytest.approx(0.3 * E / A)


@SCOPES
def test_gradient_pushes_the_crowded_expert_down(scope):
    logits_TE = torch.randn(30, E, dtype=torch.float64)
    logits_TE[:, 2] += 4
    logits_TE.requires_grad_()
    (grad,) = torch.autograd.grad(loss(Auxiliary(scope=scope), routing_of(logits_TE)), logits_TE)
    assert (grad[:, 2] > 0).all()
    assert grad.sum(0).argmax() == 2


def test_micro_batch_by_definition():
    routing = random_routing(9)
    share = [sum(row.count(e) for row in routing.experts_TA.tolist()) / (9 * A) for e in range(E)]
    mean = routing.probs_TE.mean(0).tolist()
    want = 0.01 * E * sum(f * p for f, p in zip(share, mean, strict=True))
    assert loss(Auxiliary(), routing).item() == pytest.approx(want)


def test_sequence_scope_by_hand_and_packed():
    """Each sequence against its own counts, weighted by its tokens; an empty sequence counts nothing."""
    routing, lengths = random_routing(12), [3, 0, 8, 1]
    got = loss(Auxiliary(coef=0.2, scope="sequence"), routing, lengths)
    want, at = 0.0, 0
    for length in lengths:
        if length:
            rows = slice(at, at + length)
            share_E = routing.experts_TA[rows].flatten().bincount(minlength=E) / (length * A)
            want += 0.2 * E * (share_E * routing.probs_TE[rows].mean(0)).sum().item() * length / 12
        at += length
    assert got.item() == pytest.approx(want)
    assert got.item() != pytest.approx(loss(Auxiliary(coef=0.2), routing, lengths).item())


def test_global_scope_adds_up_over_micro_batches():
    """Two micro-batches, given the counts of both, make the loss and the gradient of the one batch."""
    logits_TE = torch.randn(10, E, dtype=torch.float64, requires_grad=True)
    spec, whole = Auxiliary(scope="global_batch"), routing_of(logits_TE)
    one = spec.loss(whole, Stream.of_lengths([10]), whole.counts_E(), 10)
    parts = [routing_of(logits_TE[:4]), routing_of(logits_TE[4:])]
    counts_E = parts[0].counts_E() + parts[1].counts_E()
    two = sum(spec.loss(part, Stream.of_lengths([len(part.logits_TE)]), counts_E, 10) for part in parts)
    assert isinstance(two, Tensor)
    close(two, one, 1e-14)
    close(torch.autograd.grad(two, logits_TE)[0], torch.autograd.grad(one, logits_TE)[0], 1e-14)
    own = sum(spec.loss(part, Stream.of_lengths([1]), part.counts_E(), 10) for part in parts)
    assert own.item() != pytest.approx(one.item())  # type: ignore[arg-type]


def test_narrower_scope_costs_more():
    """When shares equal probabilities, a mean of squares is at least the square of the mean."""
    logits_TE = torch.randn(40, E, dtype=torch.float64)
    hard = torch.zeros(40, E, dtype=torch.float64).scatter_(1, routing_of(logits_TE).experts_TA, 1 / A)
    routing = Routing(logits_TE, hard, routing_of(logits_TE).experts_TA, hard[:, :A])
    lengths = [5] * 8
    assert loss(Auxiliary(scope="sequence"), routing, lengths) > loss(Auxiliary(scope="global_batch"), routing, lengths)


def test_z_loss_by_definition():
    routing = random_routing(7)
    want = sum(math.log(sum(math.exp(z) for z in row)) ** 2 for row in routing.logits_TE.tolist()) / 7
    assert loss(ZLoss(coef=0.5), routing).item() == pytest.approx(0.5 * want)


def test_training_on_the_loss_evens_the_load():
    logits_TE = torch.randn(64, E, dtype=torch.float64) + torch.linspace(0, 3, E)
    logits_TE.requires_grad_()
    before = routing_of(logits_TE).counts_E().max()
    for _ in range(60):
        (grad,) = torch.autograd.grad(loss(Auxiliary(coef=1.0), routing_of(logits_TE)), logits_TE)
        logits_TE = (logits_TE - 20 * grad).detach().requires_grad_()
    assert before > 40 and routing_of(logits_TE).counts_E().max() < 30
