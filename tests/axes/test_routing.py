"""Routers: counts, ties, gates, order; every example of the table."""

import pytest
import torch
from cases import close, examples, params

from sextant.axes.routing import TABLE, Dropless, Routing, SoftmaxTopK
from sextant.core.stream import Stream

EXPERTS, WIDTH = 7, 6


def route(spec, x_TD=None, experts: int = EXPERTS) -> Routing:
    """A random router's decision on random rows, in fp64."""
    x_TD = torch.randn(19, WIDTH, dtype=torch.float64) if x_TD is None else x_TD
    router = spec.build(x_TD.shape[1], experts).double()
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(1))
    return router(x_TD)


ROUTERS = pytest.mark.parametrize("spec", params(examples(TABLE)))


@ROUTERS
def test_every_copy_is_counted_and_choices_are_distinct(spec):
    routing = route(spec)
    assert routing.counts_E().sum() == 19 * spec.top_k
    assert routing.counts_E().dtype == routing.experts_TA.dtype == torch.int64
    assert all(len(set(row)) == spec.top_k for row in routing.experts_TA.tolist())


@ROUTERS
def test_the_best_are_chosen_best_first(spec):
    routing = route(spec)
    for probs, chosen in zip(routing.probs_TE.detach(), routing.experts_TA.tolist(), strict=True):
        assert chosen == sorted(range(EXPERTS), key=lambda e: -float(probs[e]))[: spec.top_k]


@ROUTERS
def test_ties_go_to_the_lower_number(spec):
    router = spec.build(WIDTH, 300)
    torch.nn.init.zeros_(router.weight)
    assert router(torch.randn(5, WIDTH)).experts_TA.tolist() == [list(range(spec.top_k))] * 5


@ROUTERS
def test_order_of_rows_does_not_matter(spec):
    x_TD, order = torch.randn(19, WIDTH, dtype=torch.float64), torch.randperm(19)
    straight, turned = route(spec, x_TD), route(spec, x_TD[order])
    assert torch.equal(turned.experts_TA, straight.experts_TA[order])
    close(turned.gates_TA, straight.gates_TA[order], 1e-13)


@ROUTERS
def test_one_token_and_all_experts(spec):
    routing = route(spec.replace(top_k=EXPERTS), torch.randn(1, WIDTH, dtype=torch.float64))
    assert sorted(routing.experts_TA[0].tolist()) == list(range(EXPERTS))
    assert routing.gates_TA.sum().item() == pytest.approx(getattr(spec, "scale", 1.0))


@ROUTERS
def test_gradient_equals_finite_differences(spec):
    x_TD = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    router = spec.build(WIDTH, EXPERTS).double()
    weight = torch.randn(EXPERTS, WIDTH, dtype=torch.float64, requires_grad=True)

    def gates(x_TD, weight):
        routing = torch.func.functional_call(router, {"weight": weight}, (x_TD,))
        return routing.gates_TA, routing.probs_TE, routing.logits_TE

    assert torch.autograd.gradcheck(gates, (x_TD, weight))


def test_gates_by_definition():
    x_TD = torch.randn(19, WIDTH, dtype=torch.float64)
    raw, normalised = (route(SoftmaxTopK(top_k=3, normalize=n, scale=2.0), x_TD) for n in (False, True))
    chosen_TA = raw.logits_TE.gather(1, raw.experts_TA)
    close(raw.gates_TA, 2 * raw.logits_TE.softmax(-1).gather(1, raw.experts_TA), 1e-14)
    close(normalised.gates_TA, 2 * chosen_TA.softmax(-1), 1e-14)  # choosing first, then the softmax over the chosen


def test_dropless_admits_everything_however_uneven():
    x_TD = torch.randn(1, WIDTH, dtype=torch.float64).expand(50, -1)
    routing = route(SoftmaxTopK(top_k=2), x_TD)
    assert sorted(routing.counts_E().tolist()) == [0] * (EXPERTS - 2) + [50, 50]
    assert Dropless().admit(routing, Stream.of_lengths([50]), training=True).dropped() == 0


def test_half_precision_router_would_choose_others():
    """Close logits: rows rounded to bf16 lead to other experts, so the fp32 path is real."""
    router = SoftmaxTopK(top_k=2).build(64, 32)
    torch.nn.init.normal_(router.weight, std=0.02)
    x_TD = torch.randn(400, 64)
    exact = router(x_TD).experts_TA
    rounded = (x_TD.bfloat16() @ router.weight.detach().bfloat16().T).sort(descending=True, stable=True).indices[:, :2]
    assert (exact != rounded).any(1).sum() > 4
    assert router(x_TD.bfloat16()).logits_TE.dtype == torch.float32
