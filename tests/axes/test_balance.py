"""Balance terms: known values, gradients, scopes, packed sequences, published constants, the bias (MOE-7, MOE-8)."""

import math
from dataclasses import replace

import pytest
import torch
from cases import close, examples, model_spec, params
from torch import Tensor

from sextant.axes.capacity import Experts
from sextant.axes.kv import GQA
from sextant.axes.routing import (
    BALANCE,
    Auxiliary,
    BalanceLoss,
    Bias,
    Communication,
    Device,
    Importance,
    NoisyTopK,
    Routing,
    SigmoidTopK,
    SmoothLoad,
    SoftmaxTopK,
    ZLoss,
)
from sextant.core.errors import UsageError
from sextant.core.stream import Stream
from sextant.model.checks import check
from sextant.model.spec import Layer

E, A = 6, 2


def routing_of(logits_TE: Tensor) -> Routing:
    """A top-2 softmax router's record, with a smooth load that depends on the logits."""
    probs_TE = logits_TE.softmax(-1)
    experts_TA = logits_TE.detach().sort(descending=True, stable=True).indices[:, :A]
    return Routing(logits_TE, probs_TE, experts_TA, probs_TE.gather(1, experts_TA), load_TE=logits_TE.sigmoid())


def random_routing(tokens: int) -> Routing:
    return routing_of(torch.randn(tokens, E, dtype=torch.float64, requires_grad=True))


def even_routing() -> Routing:
    """E tokens, every expert as probable and as often chosen; the two experts of a token in different thirds."""
    probs_TE = torch.full((E, E), 1 / E, dtype=torch.float64)
    experts_TA = torch.stack([torch.arange(E), (torch.arange(E) + 2) % E], dim=1)
    return Routing(probs_TE.log(), probs_TE, experts_TA, probs_TE[:, :A], load_TE=probs_TE)


def loss(spec, routing: Routing, lengths: list[int] | None = None, tokens: int | None = None) -> Tensor:
    """Of a step with this one micro-batch."""
    tokens = tokens or len(routing.logits_TE)
    return spec.loss(routing, Stream.of_lengths(lengths or [len(routing.logits_TE)]), spec.tally(routing), tokens)


TERMS = [term for term in examples(BALANCE) if isinstance(term, BalanceLoss)]
EVERY = pytest.mark.parametrize("spec", params(TERMS))
SUMMED = pytest.mark.parametrize("spec", params([term for term in TERMS if term.ahead]))
SCOPES = pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch", "running"])


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


@EVERY
def test_a_micro_batch_of_one_token_or_of_none_is_finite(spec):
    for tokens in (0, 1):
        routing = random_routing(tokens)
        value = loss(spec, routing, [tokens], tokens=9)
        (grad,) = torch.autograd.grad(value, routing.logits_TE)
        assert value.isfinite() and grad.isfinite().all()


@SUMMED
def test_micro_batches_add_up_to_the_batch(spec):
    """Given the sums of the whole step, the parts make the one batch's loss and gradient."""
    logits_TE = torch.randn(10, E, dtype=torch.float64, requires_grad=True)
    one = loss(spec, routing_of(logits_TE))
    parts = [routing_of(part) for part in logits_TE.split([3, 1, 6])]
    counts_E = sum(spec.tally(part) for part in parts)
    two = sum(spec.loss(part, Stream.of_lengths([len(part.logits_TE)]), counts_E, 10) for part in parts)
    close(two, one, 1e-13)
    close(torch.autograd.grad(two, logits_TE)[0], torch.autograd.grad(one, logits_TE)[0], 1e-13)
    own = sum(loss(spec, part, tokens=10) for part in parts)
    assert own.item() != pytest.approx(one.item())


@SCOPES
@pytest.mark.parametrize("term", params([Auxiliary(), Auxiliary(counts="first"), Device(devices=3)]))
def test_uniform_routing_costs_coef(term, scope):
    """Every expert receives the same and is as probable: coef, whatever A is (MOE-7)."""
    assert loss(term.replace(coef=0.3, scope=scope), even_routing()).item() == pytest.approx(0.3)


@SCOPES
def test_uniform_travel_costs_coef(scope):
    """Every token visits its two devices."""
    term = Communication(coef=0.3, devices=3, limit=2, scope=scope)
    assert loss(term, even_routing()).item() == pytest.approx(0.3)


@SCOPES
def test_collapse_costs_coef_times_experts_over_chosen(scope):
    logits_TE = torch.full((8, E), -50.0, dtype=torch.float64)
    logits_TE[:, :A] = 50.0
    assert loss(Auxiliary(coef=0.3, scope=scope), routing_of(logits_TE), [3, 5]).item() == pytest.approx(0.3 * E / A)


@SCOPES
@pytest.mark.parametrize("term", params([Auxiliary(), Device(devices=3)]))
def test_gradient_pushes_the_crowded_expert_down(term, scope):
    logits_TE = torch.randn(30, E, dtype=torch.float64)
    logits_TE[:, 2] += 4
    logits_TE.requires_grad_()
    (grad,) = torch.autograd.grad(loss(term.replace(scope=scope), routing_of(logits_TE)), logits_TE)
    assert (grad[:, 2] > 0).all()
    assert grad.sum(0).argmax() == 2


def test_two_tokens_by_hand():
    """MOE-7. Token 0 goes to experts 0 and 1, token 1 to 0 and 2: f = (1/2, 1/4, 1/4), P their mean probabilities."""
    probs_TE = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3]], dtype=torch.float64, requires_grad=True)
    experts_TA = torch.tensor([[0, 1], [0, 2]])
    routing = Routing(probs_TE.log(), probs_TE, experts_TA, probs_TE.gather(1, experts_TA))
    value = loss(Auxiliary(coef=1.0), routing)
    assert value.item() == pytest.approx(3 * (0.5 * 0.55 + 0.25 * 0.2 + 0.25 * 0.25))
    (grad,) = torch.autograd.grad(value, probs_TE)
    close(grad, (3 * torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64) / 2).expand(2, 3), 1e-15)  # nothing through f
    first = loss(Auxiliary(coef=1.0, counts="first"), routing)
    assert first.item() == pytest.approx(3 * 0.55)


def test_unbiased_counts_ignore_what_a_bias_chose():
    """DeepSeek-V3, equation 18: the A best of the probabilities."""
    honest = random_routing(20)
    biased = replace(honest, experts_TA=torch.tensor([[4, 5]]).expand(20, 2))
    for scope in ("micro_batch", "sequence", "global_batch"):
        spec = Auxiliary(counts="unbiased", scope=scope)
        assert loss(spec, biased, [9, 11]) == loss(spec, honest, [9, 11])
        assert loss(spec, biased, [9, 11]) != loss(spec.replace(counts="chosen"), biased, [9, 11])


@pytest.mark.parametrize("counts", ["chosen", "first"])
def test_a_copy_that_is_not_sent_does_not_count(counts):
    """A second expert that the router did not want weighs as if only one place had been there."""
    routing = random_routing(12)
    only_first = replace(routing, experts_TA=routing.experts_TA[:, :1])
    sent_TA = torch.tensor([[True, False]]).expand(12, 2)
    for scope in ("micro_batch", "sequence", "global_batch"):
        spec = Auxiliary(counts=counts, scope=scope)
        assert loss(spec, replace(routing, sent_TA=sent_TA), [5, 7]) == loss(spec, only_first, [5, 7])


def test_micro_batch_by_definition():
    routing = random_routing(9)
    share = [sum(row.count(e) for row in routing.experts_TA.tolist()) / (9 * A) for e in range(E)]
    mean = routing.probs_TE.mean(0).tolist()
    want = 0.01 * E * sum(f * p for f, p in zip(share, mean, strict=True))
    assert loss(Auxiliary(), routing).item() == pytest.approx(want)


def published(routing: Routing) -> dict[str, tuple[float, float]]:
    """Losses as their papers and codes print them, with the coefficient that makes ours equal."""
    tokens, probs = len(routing.probs_TE), routing.probs_TE.detach()
    mean_E, sum_E = probs.mean(0), probs.sum(0)
    first_E = routing.experts_TA[:, 0].bincount(minlength=E).double()
    copies_E = routing.counts_E().double()
    mask_TAE = torch.nn.functional.one_hot(routing.experts_TA, E).double()
    pooled_AE = mask_TAE.mean(0)  # transformers: tokens of each slot, times probabilities, summed over slots
    return {
        "switch": (0.01 * E * (first_E / tokens * mean_E).sum().item(), 0.01),
        "gshard": (((first_E / tokens * mean_E).sum() / E).item(), 1 / E**2),
        "lingvo": (0.01 * E**2 * ((first_E / tokens * mean_E).sum() / E).item(), 0.01),
        "tutel": (E / tokens**2 * (sum_E * first_E).sum().item(), 1.0),
        "deepseek": (0.003 * (E / (A * tokens) * copies_E * mean_E).sum().item(), 0.003),
        "minimax": (0.01 / E * (copies_E / tokens * mean_E).sum().item(), 0.01 * A / E**2),
        "transformers": (0.001 * E * (pooled_AE * mean_E).sum().item(), 0.001 * A),
    }


@pytest.mark.parametrize("name", ["switch", "gshard", "lingvo", "tutel", "deepseek", "minimax", "transformers"])
def test_published_constants(name):
    """The table in ``balance/auxiliary.py``. tests/convert compares with transformers' own function, gradients too."""
    routing = random_routing(40)
    want, coef = published(routing)[name]
    counts = "first" if name in ("switch", "gshard", "lingvo", "tutel") else "chosen"
    assert loss(Auxiliary(coef=coef, counts=counts), routing).item() == pytest.approx(want)


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


def test_narrower_scope_costs_more():
    """When shares equal probabilities, a mean of squares is at least the square of the mean."""
    for _ in range(20):
        experts_TA = torch.rand(40, E).argsort(dim=1)[:, :A]
        hard = torch.zeros(40, E, dtype=torch.float64).scatter_(1, experts_TA, 1 / A)
        routing, lengths = Routing(hard, hard, experts_TA, hard[:, :A]), [5] * 8
        narrow, wide = (loss(Auxiliary(scope=scope), routing, lengths) for scope in ("sequence", "global_batch"))
        assert narrow > wide


def test_scopes_agree_on_one_sequence_in_one_micro_batch():
    routing = random_routing(9)
    values = [loss(Auxiliary(scope=s), routing).item() for s in ("micro_batch", "sequence", "global_batch", "running")]
    assert values == pytest.approx([values[0]] * 4)


@SCOPES
def test_device_loss_by_definition(scope):
    """DeepSeek-V2, equations 26 to 28: f' the mean of ``f_e = E / (A T) c_e`` over a group, P' the sum of P."""
    routing, groups = random_routing(11), [[0, 1], [2, 3], [4, 5]]
    f_E, p_E = E / (A * 11) * routing.counts_E(), routing.probs_TE.mean(0)
    want = 0.05 * sum(f_E[group].mean() * p_E[group].sum() for group in groups)
    assert loss(Device(devices=3, scope=scope), routing).item() == pytest.approx(want.item())


@SCOPES
def test_communication_loss_by_definition(scope):
    """DeepSeek-V2, equations 29 to 31: a token with both experts on one device travels there once."""
    routing = random_routing(11)
    visits = [set((experts // 2).tolist()) for experts in routing.experts_TA]
    assert any(len(one) == 1 for one in visits)
    p_E = routing.probs_TE.mean(0)
    sent = [sum(device in one for one in visits) for device in range(3)]
    want = 0.02 * sum(3 / (2 * 11) * sent[d] * p_E[2 * d : 2 * d + 2].sum() for d in range(3))
    assert loss(Communication(devices=3, limit=2, scope=scope), routing).item() == pytest.approx(want.item())


def test_importance_by_definition():
    """CV^2 of the sums of gates, those of experts not chosen being 0; the router's scale does not matter."""
    routing = random_routing(9)
    sums = torch.zeros(E, dtype=torch.float64)
    for experts, gates in zip(routing.experts_TA.tolist(), routing.gates_TA.tolist(), strict=True):
        for expert, gate in zip(experts, gates, strict=True):
            sums[expert] += gate
    want = 0.1 * sums.var(correction=0) / sums.mean() ** 2
    assert loss(Importance(), routing).item() == pytest.approx(want.item())
    scaled = replace(routing, gates_TA=2.5 * routing.gates_TA)
    assert loss(Importance(), scaled).item() == pytest.approx(want.item())


def test_load_by_definition():
    routing = random_routing(9)
    sums = routing.load_TE.sum(0)
    want = 0.2 * sums.var(correction=0) / sums.mean() ** 2
    assert loss(SmoothLoad(coef=0.2), routing).item() == pytest.approx(want.item())


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
def test_spread_is_zero_when_even_and_greatest_in_collapse(scope):
    assert loss(Importance(scope=scope), even_routing()).item() == pytest.approx(0)
    assert loss(SmoothLoad(scope=scope), even_routing()).item() == pytest.approx(0)
    one = Routing(torch.zeros(4, E), torch.zeros(4, E), torch.full((4, 1), 3), torch.ones(4, 1))
    assert loss(Importance(coef=1.0, scope=scope), one).item() == pytest.approx(E - 1)


def test_load_of_a_real_noisy_router():
    """Its gradient reaches both of the router's matrices, and pushes the expert down that is sent most."""
    module = NoisyTopK(top_k=2, floor=0.1).build(8, E).double()
    torch.nn.init.normal_(module.weight, std=0.5)
    torch.nn.init.zeros_(module.noise)
    routing = module(torch.randn(50, 8, dtype=torch.float64))
    routing.logits_TE.retain_grad()
    loss(SmoothLoad(), routing).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


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


# the bias


def biased_router(experts: int, top_k: int, width: int = 8):
    """A frozen V3 router: rows are the logits themselves where the width allows."""
    module = SigmoidTopK(top_k=top_k).build(width, experts).requires_grad_(False)
    with torch.no_grad():
        module.weight.copy_(torch.eye(experts, width))
    return module


@pytest.mark.parametrize(
    ("term", "want"),
    params([
        (Bias(rate=0.5), (-0.5, 0.5, 0.0, 0.5)),
        (Bias(rate=0.5, rule="proportional"), (-0.75, 0.25, 0.0, 0.5)),
        (Bias(rate=0.0), (0.0, 0.0, 0.0, 0.0)),
        (Bias(rate=0.5, until=0.2), (0.0, 0.0, 0.0, 0.0)),
    ]),
)
def test_bias_by_hand(term, want):
    """Counts 10, 2, 4, 0 have the mean 4. The mean of b moves too, and nobody re-centres it."""
    module = biased_router(4, 1)
    term.update(module, torch.tensor([10, 2, 4, 0]), progress=0.2)
    assert module.bias.value_E.tolist() == pytest.approx(want)
    assert module.bias.value_E.dtype == torch.float32 and not module.bias.value_E.requires_grad


def test_a_step_without_copies_leaves_the_bias():
    module = biased_router(4, 1)
    for rule in ("sign", "proportional"):
        Bias(rule=rule).update(module, torch.zeros(4, dtype=torch.int64), 0.0)
    assert module.bias.value_E.tolist() == [0.0] * 4


def test_the_sign_is_exact_for_counts_beyond_what_floats_hold():
    """Whole numbers decide: one copy too many among 2^60 is seen, and exact balance is left alone."""
    module = biased_router(2, 1)
    Bias(rate=1.0).update(module, torch.tensor([2**60 + 1, 2**60 - 1]), 0.0)
    assert module.bias.value_E.tolist() == [-1.0, 1.0]
    Bias(rate=1.0).update(module, torch.tensor([2**60, 2**60]), 0.0)
    assert module.bias.value_E.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(("rule", "rate"), [("sign", 3e-3), ("proportional", 2e-2)])
def test_bias_evens_a_frozen_router_and_then_rests(rule, rate):
    """MOE-8: 16 experts, top 4, unit-variance logits, 2048 tokens a step. The stream of spec 2.3."""
    module, term = biased_router(16, 4, width=16), Bias(rate=rate, rule=rule, until=0.9)
    favour_E, violations, steps = torch.randn(16), [], 300
    for step in range(steps):
        routing = module((torch.randn(2048, 16) + favour_E) / math.sqrt(2))
        counts_E = term.tally(routing)
        violations.append((counts_E.max() / counts_E.double().mean()).item() - 1)
        before_E = module.bias.value_E.clone()
        term.update(module, counts_E, step / steps)
        assert torch.equal(before_E, module.bias.value_E) == (step >= 0.9 * steps)
    assert violations[0] > 0.8
    assert sum(violations[-30:]) / 30 < 0.1


# what a term needs


def layer_with(router, *balance) -> Layer:
    ffn = Experts(experts=6, hidden=4, router=router, balance=balance)
    return Layer(kv=GQA(heads=2, kv_heads=1, head_dim=4), feed_forward=ffn)


@pytest.mark.parametrize(
    ("router", "term", "reason", "remedy"),
    [
        (SoftmaxTopK(top_k=2), Bias(), "router softmax_topk has no selection bias", "Set router.bias: true"),
        (SigmoidTopK(top_k=2, bias=False), Bias(), "router sigmoid_topk has no selection bias", "Set router.bias"),
        (SoftmaxTopK(top_k=2), SmoothLoad(), "gives no smooth estimate of its load", "noisy_topk"),
        (SoftmaxTopK(top_k=2), Device(devices=4), "6 experts do not spread evenly over 4 devices", "a divisor of 6"),
        (SoftmaxTopK(top_k=2), Communication(devices=4, limit=2), "do not spread evenly", "a divisor of 6"),
        (SoftmaxTopK(top_k=2), Communication(devices=3, limit=4), "limit 4 exceeds devices 3", "most devices"),
    ],
)
def test_refused_by_name(router, term, reason, remedy):
    with pytest.raises(UsageError) as refusal:
        check(model_spec(layer_with(router, ZLoss(), term)))
    line = str(refusal.value)
    assert "model.layers[0].feed_forward.balance[1]" in line and reason in line and remedy in line


@pytest.mark.parametrize(
    ("router", "term"),
    [
        (SoftmaxTopK(top_k=2, bias=True), Bias()), (SigmoidTopK(top_k=2), Bias()), (NoisyTopK(top_k=2), SmoothLoad()),
        (SoftmaxTopK(top_k=2), Device(devices=3)), (SoftmaxTopK(top_k=2), Communication(devices=3, limit=3)),
    ],
)
def test_accepted(router, term):
    check(model_spec(layer_with(router, term)))


def test_load_loss_without_an_estimate_is_refused_at_run_time_too():
    with pytest.raises(UsageError, match="needs a router that estimates its load"):
        loss(SmoothLoad(), replace(random_routing(3), load_TE=None))
