"""What every router of the table keeps to: counts, ties, order, gradients, replay, bad numbers, bad declarations."""

import pytest
import torch
from cases import close, examples, params
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sextant.axes.capacity import Experts
from sextant.axes.numerics import FP32
from sextant.axes.routing import (
    TABLE,
    Dropless,
    ExpertChoice,
    Groups,
    GShard,
    NoisyTopK,
    Routing,
    SigmoidTopK,
    SoftmaxTopK,
    Switch,
)
from sextant.core.cost import At
from sextant.core.errors import UsageError
from sextant.core.stream import Stream

EXPERTS, WIDTH, TOKENS = 8, 6, 19
ALL = examples(TABLE)
ROUTERS = pytest.mark.parametrize("spec", params(ALL))
BY_TOKEN = pytest.mark.parametrize("spec", params(spec for spec in ALL if not isinstance(spec, ExpertChoice)))
TRAINING = pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])


def rows(tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, WIDTH, dtype=torch.float64)


def built(spec, experts: int = EXPERTS, seed: int = 1, training: bool = False):
    """Random matrices, and a random bias where there is one, in fp64."""
    router, generator = spec.build(WIDTH, experts).double().train(training), torch.Generator().manual_seed(seed)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    if getattr(router, "bias", None) is not None:
        router.bias.value_E.normal_(std=0.2, generator=generator)
    return router


def route(spec, x_TD: Tensor | None = None, **how) -> Routing:
    return built(spec, **how)(rows() if x_TD is None else x_TD)


def sent(routing: Routing) -> Tensor:
    """bool ``[T, A]``."""
    return torch.ones_like(routing.experts_TA, dtype=torch.bool) if routing.sent_TA is None else routing.sent_TA


@TRAINING
@ROUTERS
def test_every_copy_is_counted_and_choices_are_distinct(spec, training):
    routing = route(spec, training=training)
    assert routing.experts_TA.shape == routing.gates_TA.shape == (TOKENS, spec.places(EXPERTS))
    assert routing.counts_E().dtype == routing.experts_TA.dtype == torch.int64
    assert all(len(set(row)) == len(row) for row in routing.experts_TA.tolist())
    by_hand = [0] * EXPERTS
    for e, is_sent in zip(routing.experts_TA.flatten().tolist(), sent(routing).flatten().tolist(), strict=True):
        by_hand[e] += is_sent
    assert routing.counts_E().tolist() == routing.taken_E().tolist() == by_hand
    assert routing.dropped() == routing.drop_rate() == 0
    assert (routing.gates_TA[~sent(routing)] == 0).all()
    assert (routing.gates_TA[sent(routing)] > 0).all()


@TRAINING
@ROUTERS
def test_probabilities_sum_to_one(spec, training):
    close(route(spec, training=training).probs_TE.sum(1), torch.ones(TOKENS, dtype=torch.float64), 1e-14)


@ROUTERS
def test_evaluation_repeats_bit_for_bit(spec):
    router, x_TD = built(spec), rows()
    one, two = router(x_TD), router(x_TD)
    assert torch.equal(one.experts_TA, two.experts_TA)
    assert torch.equal(one.gates_TA, two.gates_TA)


@ROUTERS
def test_those_sent_come_first_and_best_first(spec):
    routing = route(spec)
    table = zip(routing.probs_TE.detach(), routing.experts_TA.tolist(), sent(routing), strict=True)
    for probs, chosen, is_sent in table:
        count = int(is_sent.sum())
        assert is_sent.tolist() == [True] * count + [False] * (len(chosen) - count)
        assert chosen[:count] == sorted(chosen[:count], key=lambda e: -float(probs[e]))


@BY_TOKEN
def test_ties_go_to_the_lower_number(spec):
    router = spec.build(WIDTH, 300).eval()
    for parameter in router.parameters():
        torch.nn.init.zeros_(parameter)
    assert router(torch.randn(5, WIDTH)).experts_TA.tolist() == [list(range(spec.top_k))] * 5


@ROUTERS
def test_order_of_rows_does_not_matter(spec):
    x_TD, order = rows(), torch.randperm(TOKENS)
    straight, turned = route(spec, x_TD), route(spec, x_TD[order])
    assert torch.equal(turned.experts_TA, straight.experts_TA[order])
    close(turned.gates_TA, straight.gates_TA[order], 1e-13)


@BY_TOKEN
def test_a_token_is_routed_by_itself(spec):
    """So routers are causal; only a choice by experts is not."""
    x_TD = rows()
    whole = route(spec, x_TD)
    for part in (slice(0, 1), slice(0, 7), slice(18, 19)):
        alone = route(spec, x_TD[part])
        assert torch.equal(alone.experts_TA, whole.experts_TA[part])
        close(alone.gates_TA, whole.gates_TA[part], 1e-14)


@ROUTERS
def test_no_token(spec):
    routing = route(spec, rows(0))
    assert routing.gates_TA.shape == (0, spec.places(EXPERTS))
    assert routing.counts_E().tolist() == [0] * EXPERTS


@pytest.mark.parametrize(
    "spec", params([SoftmaxTopK(top_k=EXPERTS, normalize=True, scale=2.5), SigmoidTopK(top_k=EXPERTS, scale=2.5),
                    NoisyTopK(top_k=EXPERTS), ExpertChoice(top_k=EXPERTS)])
)
@TRAINING
def test_one_token_and_all_experts(spec, training):
    routing = route(spec, rows(1), training=training)
    assert sorted(routing.experts_TA[0].tolist()) == list(range(EXPERTS))
    assert routing.gates_TA.sum().item() == pytest.approx(getattr(spec, "scale", 1.0))
    if routing.load_TE is not None:
        assert (routing.load_TE == 1).all()


@TRAINING
@ROUTERS
def test_gradient_equals_finite_differences(spec, training):
    """With the same draws each time; the smooth load included."""
    router, x_TD = built(spec, training=training), rows(4).requires_grad_()
    names = [name for name, _ in router.named_parameters()]

    def told(x_TD, *matrices):
        torch.manual_seed(5)
        routing = torch.func.functional_call(router, dict(zip(names, matrices, strict=True)), (x_TD,))
        load = () if routing.load_TE is None else (routing.load_TE,)
        return routing.gates_TA, routing.probs_TE, routing.logits_TE, *load

    matrices = [parameter.detach().clone().requires_grad_() for parameter in router.parameters()]
    assert torch.autograd.gradcheck(told, (x_TD, *matrices), fast_mode=True)


@ROUTERS
def test_replay_of_the_own_choice_changes_nothing(spec):
    router, x_TD = built(spec), rows()
    own = router(x_TD)
    again = router(x_TD, own.experts_TA)
    assert torch.equal(again.experts_TA, own.experts_TA)
    assert torch.equal(again.gates_TA * sent(own), own.gates_TA)
    assert torch.equal(again.probs_TE, own.probs_TE)


@ROUTERS
def test_replay_under_other_weights_keeps_the_experts_and_weighs_them_anew(spec):
    x_TD, other = rows(), built(spec, seed=2)
    recorded = route(spec, x_TD)
    replayed = other(x_TD, recorded.experts_TA)
    assert torch.equal(replayed.experts_TA, recorded.experts_TA)
    assert not torch.equal(other(x_TD).experts_TA, recorded.experts_TA)
    given = replayed.probs_TE.gather(1, recorded.experts_TA)
    ratio = replayed.gates_TA / given  # gates follow the router's own probabilities of the given experts
    close(ratio, ratio[:, :1].expand_as(ratio), 1e-12)


@ROUTERS
def test_a_nan_shows_in_its_own_token(spec):
    x_TD = rows()
    x_TD[3, 2] = torch.nan
    routing = route(spec, x_TD)
    bad_T = routing.gates_TA.isnan().any(1)
    assert bad_T.tolist() == [token == 3 for token in range(TOKENS)]
    assert ((routing.experts_TA >= 0) & (routing.experts_TA < EXPERTS)).all()


@pytest.mark.parametrize("spec", params(spec for spec in ALL if not isinstance(spec, SigmoidTopK)))
def test_an_infinite_logit_of_a_softmax_is_nan(spec):
    router = built(spec)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[5, 0] = 1e300
    x_TD = torch.full((2, WIDTH), 1e300, dtype=torch.float64)
    assert router(x_TD).gates_TA.isnan().any(1).all()


def test_infinite_logits_of_a_sigmoid_are_its_limits():
    router = built(SigmoidTopK(top_k=2, normalize=False, bias=False))
    with torch.no_grad():
        router.weight[:, 1:] = 0
        router.weight[:, 0] = torch.tensor([-1e300, 0, 0, 1e300, 0, 0, 0, 0], dtype=torch.float64)
    routing = router(torch.full((2, WIDTH), 1e300, dtype=torch.float64))
    assert routing.logits_TE[0, [0, 3]].tolist() == [-torch.inf, torch.inf]
    assert routing.experts_TA.tolist() == [[3, 1]] * 2
    assert routing.gates_TA.tolist() == [[1.0, 0.5]] * 2


def test_affinities_that_underflow_give_no_nan():
    router = SigmoidTopK(top_k=2).build(1, 4)
    torch.nn.init.constant_(router.weight, -200.0)
    routing = router(torch.ones(3, 1))
    assert routing.gates_TA.tolist() == [[0.0, 0.0]] * 3
    assert routing.probs_TE.tolist() == [[0.25] * 4] * 3


@ROUTERS
def test_rows_of_half_precision_are_routed_in_fp32(spec):
    router = spec.build(WIDTH, EXPERTS)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    routing = router(torch.randn(9, WIDTH).bfloat16())
    assert routing.logits_TE.dtype == routing.probs_TE.dtype == routing.gates_TA.dtype == torch.float32


def test_half_precision_router_would_choose_others():
    """Close logits: rows rounded to bf16 lead to other experts, so the fp32 path is real."""
    router = SoftmaxTopK(top_k=2).build(64, 32)
    torch.nn.init.normal_(router.weight, std=0.02)
    x_TD = torch.randn(400, 64)
    exact = router(x_TD).experts_TA
    rounded = (x_TD.bfloat16() @ router.weight.detach().bfloat16().T).sort(descending=True, stable=True).indices[:, :2]
    assert (exact != rounded).any(1).sum() > 4


@TRAINING
@ROUTERS
def test_experts_answer_the_copies_that_were_sent(spec, training):
    """A layer of experts against every expert on every token, weighted by the record."""
    module = Experts(experts=EXPERTS, hidden=5, router=spec).build(WIDTH, FP32()).double().train(training)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x_TD = rows()
    y_TD, routing = module(x_TD, Stream.of_lengths([TOKENS]))
    gates_TE = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64).scatter(1, routing.experts_TA, routing.gates_TA)
    close(y_TD, torch.einsum("te,etd->td", gates_TE, module.experts.all(x_TD)), 1e-11)
    y_TD.sum().backward()
    assert module.router.weight.grad.abs().sum() > 0


@TRAINING
@ROUTERS
def test_products_are_those_of_the_cost(spec, training):
    """Parameters are compared in the contract over costs."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        route(spec, training=training)
    assert counter.get_total_flops() == TOKENS * spec.cost(WIDTH, EXPERTS, At(TOKENS)).flops


@ROUTERS
def test_what_is_kept_for_backward_is_as_declared(spec):
    """The record, and what autograd saves, within a sixth for many experts: no order of all beside it."""
    router, x_TD, kept = built(spec, experts=48, training=True).float(), rows(64).float().requires_grad_(), {}
    theirs = {tensor.untyped_storage().data_ptr() for tensor in (x_TD, *router.parameters())}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        routing = router(x_TD)
    for tensor in (routing.logits_TE, routing.probs_TE, routing.experts_TA, routing.gates_TA):
        keep(tensor)
    measured = sum(storage.nbytes() for address, storage in kept.items() if address not in theirs)
    chosen = 0 if spec.places(48) == 48 else 24 * spec.top_k  # the layer of experts declares those of the few
    assert 64 * (spec.cost(WIDTH, 48, At(64)).activation_bytes + chosen) == pytest.approx(measured, rel=1 / 6)


def test_dropless_admits_everything_however_uneven():
    x_TD = rows(1).expand(50, -1)
    routing = route(SoftmaxTopK(top_k=2), x_TD)
    assert sorted(routing.counts_E().tolist()) == [0] * (EXPERTS - 2) + [50, 50]
    assert Dropless().admit(routing, Stream.of_lengths([50]), training=True).dropped() == 0


@pytest.mark.parametrize("spec", params(spec for spec in ALL if spec.top_k > 1))
def test_too_few_experts_are_refused(spec):
    with pytest.raises(UsageError, match=rf"router.top_k {spec.top_k} exceeds experts {spec.top_k - 1}"):
        Experts.parse({"experts": spec.top_k - 1, "hidden": 4, "router": spec.to_dict()})


GROUPS = Groups(count=4, kept=2)


@pytest.mark.parametrize(
    "router, experts, message",
    [
        (SoftmaxTopK(top_k=2, groups=GROUPS), 6, "router.groups.count 4 does not divide experts 6"),
        (SigmoidTopK(top_k=5, groups=GROUPS), 8, "router.top_k 5 exceeds the 4 experts of the kept groups"),
        (SigmoidTopK(top_k=1, groups=GROUPS.replace(score="top2")), 4, "top2 needs groups of 2, got 4 experts in 4"),
    ],
)
def test_groups_that_do_not_fit_are_refused(router, experts, message):
    with pytest.raises(UsageError, match=message):
        Experts.parse({"experts": experts, "hidden": 4, "router": router.to_dict()})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Groups.parse({"count": 2, "kept": 3}), "kept 3 exceeds count 2"),
        (lambda: SoftmaxTopK.parse({"top_k": 0}), "top_k"),
        (lambda: SoftmaxTopK.parse({"top_k": 1, "jitter": 1.0}), "jitter"),
        (lambda: Switch.parse({"top_k": 2}), "top_k"),
        (lambda: GShard.parse({"top_k": 1}), "top_k"),
        (lambda: GShard.parse({"second": "random"}), "second"),
    ],
)
def test_declarations_without_a_meaning_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
