"""Rules for full experts: every example against a loop over copies, admission against a greedy loop, what each rule
reports, causality and its failures.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import close, examples, params
from torch import Tensor

from sextant.axes.capacity import Experts
from sextant.axes.capacity.stack import ExpertStack
from sextant.axes.numerics import FP32
from sextant.axes.routing import (
    OVERFLOW,
    BlockPadded,
    Capacity,
    CappedRounds,
    DeviceCapacity,
    Dropless,
    Dynamic,
    GShard,
    Overflow,
    Pooled,
    Routing,
    SoftmaxTopK,
)
from sextant.core.cost import At
from sextant.core.errors import UsageError
from sextant.core.stream import Stream

EXPERTS, WIDTH, HIDDEN = 5, 4, 3
RULES = params(examples(OVERFLOW))
NEVER_DROP = params(rule for rule in examples(OVERFLOW) if isinstance(rule, Dropless | BlockPadded | CappedRounds))


def routed(logits_TE: Tensor, chosen: int = 2) -> Routing:
    """Softmax, the best, raw gates; the gates are a leaf of their own."""
    probs_TE = logits_TE.softmax(-1)
    gates_TA, experts_TA = probs_TE.topk(chosen)
    return Routing(logits_TE, probs_TE, experts_TA, gates_TA.detach().requires_grad_())


def random_routing(tokens: int = 17, chosen: int = 2, skew: float = 1.0, experts: int = EXPERTS) -> Routing:
    """Uneven: low numbers are liked better."""
    return routed(torch.randn(tokens, experts).double() - skew * torch.arange(experts) / 2, chosen)


LOADS: dict[str, Callable[[], Routing]] = {
    "random": random_routing,
    "all to two": lambda: routed(torch.arange(EXPERTS).double().neg().expand(9, -1)),
    "one token": lambda: random_routing(1),
    "no tokens": lambda: random_routing(0),
    "top one": lambda: random_routing(13, 1),
    "top all": lambda: random_routing(6, EXPERTS),
}


def stack(dtype: torch.dtype = torch.float64, experts: int = EXPERTS, width: int = WIDTH) -> ExpertStack:
    module = ExpertStack(experts, width, HIDDEN, "swiglu").to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def by_loop(experts: ExpertStack, x_TD: Tensor, routing: Routing) -> Tensor:
    """One copy after another, dropped ones left out."""
    total_TD = torch.zeros_like(x_TD)
    kept_TA = torch.ones_like(routing.experts_TA, dtype=torch.bool) if routing.kept_TA is None else routing.kept_TA
    for t, a in kept_TA.nonzero().tolist():
        e = int(routing.experts_TA[t, a])
        gate, value = (x_TD[t] @ experts.up_EDF[e]).chunk(2)
        y = (F.silu(gate) * value) @ experts.down_EFD[e]
        total_TD = total_TD.index_add(0, torch.tensor([t]), (routing.gates_TA[t, a] * y)[None])
    return total_TD


def stream_of(tokens: int) -> Stream:
    """Two sequences, of which the first is shorter."""
    return Stream.of_lengths([tokens // 3, tokens - tokens // 3])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("rule", RULES)
def test_equals_a_loop_over_copies(rule: Overflow, load, training):
    """Values and the gradients by rows, gates and both stacks, however the copies lie."""
    routing, experts = LOADS[load](), stack()
    tokens = len(routing.experts_TA)
    routing = rule.admit(routing, stream_of(tokens), training)
    x_TD = torch.randn(tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    got_TD, usage = rule.compute(experts, x_TD, routing)
    want_TD = by_loop(experts, x_TD, routing)
    close(got_TD, want_TD, 1e-12)
    leaves = (x_TD, routing.gates_TA, experts.up_EDF, experts.down_EFD)
    weight_TD = torch.randn_like(want_TD)
    want = torch.autograd.grad((want_TD * weight_TD).sum() + sum(0 * leaf.sum() for leaf in leaves), leaves)
    for g, w in zip(torch.autograd.grad(got_TD, leaves, weight_TD), want, strict=True):
        close(g, w, 1e-12)
    assert usage.rows - usage.padding == routing.taken_E().sum()
    assert usage.peak <= usage.rows


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("rule", RULES)
def test_decoding_leaves_out_what_training_leaves_out(rule: Overflow, load):
    """Without gradients few rows take other ways, which see the same drops."""
    routing, experts = LOADS[load](), stack()
    routing = rule.admit(routing, stream_of(len(routing.experts_TA)), training=True)
    x_TD = torch.randn(len(routing.experts_TA), WIDTH, dtype=torch.float64)
    with torch.no_grad():
        close(rule.compute(experts, x_TD, routing)[0], by_loop(experts, x_TD, routing), 1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("rule", RULES)
def test_kept_and_dropped_are_all(rule: Overflow, load, training):
    routing = LOADS[load]()
    routing = rule.admit(routing, stream_of(len(routing.experts_TA)), training)
    copies = routing.experts_TA.numel()
    assert routing.counts_E().sum() == copies
    assert routing.taken_E().sum() + routing.dropped() == copies
    assert (routing.taken_E() <= routing.counts_E()).all()
    assert routing.drop_rate() == routing.dropped() / max(copies, 1)


@pytest.mark.parametrize("rule", NEVER_DROP)
def test_these_never_drop(rule: Overflow):
    routing = rule.admit(LOADS["all to two"](), stream_of(9), training=True)
    assert routing.dropped() == 0
    assert routing.taken_E().tolist() == [9, 9, 0, 0, 0]


@pytest.mark.parametrize(
    "rule",
    params([Capacity(factor=0.4), Pooled(factor=0.4, groups=2), DeviceCapacity(factor=0.4, devices=1, exempt=0.0)]),
)
def test_evaluation_has_its_own_factor(rule):
    routing = random_routing(40)
    assert rule.admit(routing, stream_of(40), training=True).dropped() > 0
    assert rule.admit(routing, stream_of(40), training=False).kept_TA is None
    same = rule.replace(eval_factor=0.4)
    assert torch.equal(*(same.admit(routing, stream_of(40), training=t).kept_TA for t in (True, False)))


@pytest.mark.parametrize("rule", RULES)
def test_what_the_router_kept_back_takes_no_place(rule: Overflow):
    """Copies that were never sent stay away, and the others are served as if those did not exist."""
    routing = random_routing(20)
    sent_TA = torch.rand(20, 2) < 0.5
    torch.manual_seed(4)
    got = rule.admit(replace(routing, kept_TA=sent_TA, sent_TA=sent_TA), stream_of(20), training=True)
    assert not (got.kept_TA & ~sent_TA).any()
    assert got.taken_E().sum() + got.dropped() == sent_TA.sum()
    roomy = Capacity(factor=EXPERTS / 2)
    assert torch.equal(roomy.admit(got, stream_of(20), training=True).kept_TA, got.kept_TA)


def greedy(routing: Routing, order: str, limits: dict[int, int], groups: list[int]) -> Tensor:
    """Admission as the papers tell it: copies come one by one and take a place or none."""
    tokens, chosen = routing.experts_TA.shape
    p = routing.probs_TE
    best = {t: max(p[t, e].item() for e in routing.experts_TA[t].tolist()) for t in range(tokens)}
    keys = {
        "choice": lambda t, a: (a, t),
        "position": lambda t, a: (t, a),
        "score": lambda t, a: (a, -best[t], t),
        "affinity": lambda t, a: (-p[t, routing.experts_TA[t, a]].item(), t),
    }
    copies = sorted(((t, a) for t in range(tokens) for a in range(chosen)), key=lambda copy: keys[order](*copy))
    kept_TA, taken = torch.zeros(tokens, chosen, dtype=torch.bool), {}
    for t, a in copies:
        place = (groups[t], int(routing.experts_TA[t, a]))
        taken[place] = taken.get(place, 0) + 1
        kept_TA[t, a] = taken[place] <= limits[groups[t]]
    return kept_TA


@pytest.mark.parametrize("group", ["sequence", "tokens"])
@pytest.mark.parametrize("order", ["choice", "position", "score", "affinity"])
@pytest.mark.parametrize(("factor", "minimum"), [(1.0, 1), (0.5, 1), (0.5, 4), (1.3, 2)])
def test_capacity_equals_a_greedy_loop(group, order, factor, minimum):
    routing, lengths = random_routing(31), [7, 1, 0, 23]
    sizes = lengths if group == "sequence" else [31]
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    limits = {g: max(minimum, -int(-factor * size * 2 // EXPERTS)) for g, size in enumerate(sizes)}
    rule = Capacity(factor=factor, minimum=minimum, order=order, group=group)
    got = rule.admit(routing, Stream.of_lengths(lengths), training=True)
    assert torch.equal(got.kept_TA, greedy(routing, order, limits, groups))
    assert got.dropped() > 0


def test_random_places_are_random_full_and_repeat_with_the_seed():
    routing, rule = routed(torch.arange(EXPERTS).double().neg().expand(50, -1)), Capacity(factor=0.5, order="random")
    kept = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        kept.append(rule.admit(routing, stream_of(50), training=True).kept_TA)
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])
    assert [mask.sum(0).tolist() for mask in kept] == [[10, 10]] * 3
    assert kept[0][25:].any() and kept[0][:25].any()


@pytest.mark.parametrize("chosen", [1, 2, 3])
@pytest.mark.parametrize("order", ["choice", "position", "score", "affinity", "random"])
def test_a_factor_of_experts_over_choices_never_drops(order, chosen):
    """Every expert could take every token: the dropless result, also where E/A has no exact number."""
    experts, x_TD = stack(), torch.randn(33, WIDTH, dtype=torch.float64)
    routing = routed(torch.arange(EXPERTS).double().neg().expand(33, -1), chosen)
    for rule in (Capacity(factor=EXPERTS / chosen, order=order), Pooled(factor=EXPERTS / chosen, groups=4)):
        admitted = rule.admit(routing, stream_of(33), training=True)
        assert admitted.dropped() == 0
        close(rule.compute(experts, x_TD, admitted)[0], Dropless().compute(experts, x_TD, routing)[0], 1e-13)


def test_places_are_not_one_too_many():
    """``ceil`` of a product that is whole in exact arithmetic."""
    routing = routed(torch.arange(10).double().neg().expand(100, -1), 1)
    for tenths in (7, 11, 12, 13, 23, 29):  # in binary 100 * 1.1 / 10 lies above 11
        kept = Capacity(factor=tenths / 10).admit(routing, stream_of(100), training=True).taken_E()[0]
        assert kept == tenths


def test_a_dropped_token_gives_exactly_nothing():
    """Its layer's output is 0, so that it passes by the residual; gradients to it are 0 too."""
    spec = Experts(experts=4, hidden=3, router=SoftmaxTopK(top_k=2), overflow=Capacity(factor=0.3))
    module = spec.build(WIDTH, FP32()).train()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x_TD = torch.randn(40, WIDTH, requires_grad=True)
    y_TD, routing = module(x_TD, Stream.of_lengths([40]))
    gone_T = ~routing.kept_TA.any(1)
    assert 0 < gone_T.sum() < 40
    assert (y_TD[gone_T] == 0).all()
    assert (y_TD[~gone_T] != 0).any(1).all()
    y_TD.square().sum().backward()
    assert (x_TD.grad[gone_T] == 0).all()


def outputs(rule: Overflow, chosen: int, lengths: list[int], change: int) -> tuple[Tensor, Tensor]:
    """Outputs of a layer before and after the tokens of ``change`` are changed, with the same random numbers."""
    experts, weight_DE = stack(), torch.randn(WIDTH, EXPERTS, dtype=torch.float64)
    x_TD = torch.randn(sum(lengths), WIDTH, dtype=torch.float64)
    z_TD = x_TD.clone()
    z_TD[change:] = torch.randn_like(z_TD[change:])
    found = []
    for rows_TD in (x_TD, z_TD):
        torch.manual_seed(7)
        routing = rule.admit(routed(rows_TD @ weight_DE, chosen), Stream.of_lengths(lengths), training=True)
        found.append(rule.compute(experts, rows_TD, routing)[0])
    return found[0], found[1]


def leaks(rule: Overflow, chosen: int = 2, lengths: tuple[int, ...] = (48,), tail: int = 24) -> bool:
    """Whether changing the last tokens can change an output before them."""
    first = sum(lengths) - tail
    pairs = [outputs(rule, chosen, list(lengths), first) for _ in range(6)]
    return any((was[:first] - now[:first]).abs().max() > 1e-9 for was, now in pairs)


@pytest.mark.parametrize(
    "rule", params([*(case.values[0] for case in NEVER_DROP), Dynamic(), Capacity(factor=EXPERTS / 2, order="score")])
)
def test_what_never_drops_is_causal(rule):
    assert not leaks(rule)


@pytest.mark.parametrize(
    ("rule", "chosen", "lengths", "leaky"),
    [
        (Capacity(factor=1.0, order="score"), 2, (48,), True),
        (Capacity(factor=1.0, order="affinity"), 2, (48,), True),
        (DeviceCapacity(factor=0.7, devices=5, exempt=0.0), 2, (48,), True),
        (Capacity(factor=0.5, order="choice"), 2, (48,), True),  # a later first choice before an earlier second one
        (Capacity(factor=1.0, order="choice"), 1, (48,), False),
        (Capacity(factor=1.0, order="position"), 2, (48,), False),
        (Pooled(factor=1.0, groups=3), 2, (48,), False),
        (Capacity(factor=1.0, order="position"), 2, (24, 24), False),
        (Capacity(factor=1.0, order="score", group="sequence"), 2, (24, 24), False),  # another group
    ],
)
def test_who_can_take_a_place_from_earlier_tokens(rule, chosen, lengths, leaky):
    """The documented failure of capacity: with a limit some orders let the future decide about the past."""
    assert leaks(rule, chosen, lengths) is leaky


def test_random_places_depend_on_later_tokens():
    """With the same draw, since a random order puts later tokens before earlier ones."""
    assert leaks(Capacity(factor=1.0, order="random"))


@pytest.mark.parametrize(("group", "interfere"), [("tokens", True), ("sequence", False)])
def test_batch_mates(group, interfere):
    """The second sequence feels the first one's tokens when both queue for the same places, in any order."""
    rule, first = Capacity(factor=0.8, order="position", group=group), torch.randn(2, 24, EXPERTS).double()
    second_TE, stream = torch.randn(24, EXPERTS).double(), Stream.of_lengths([24, 24])
    kept = [rule.admit(routed(torch.cat([one, second_TE])), stream, training=True).kept_TA[24:] for one in first]
    assert torch.equal(*kept) is not interfere


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_pooled_places_drop_no_more_than_places_per_group(groups):
    """Whatever the loads; equal when they are even; the same copies as one group with all the places."""
    stream = Stream.of_lengths([12] * groups)
    fewer = 0
    for skew in (0.0, 0.5, 1.0, 2.0) * 3:
        routing = random_routing(12 * groups, skew=skew)
        pooled = Pooled(factor=1.0, groups=groups).admit(routing, stream, training=True)
        apart = Capacity(factor=1.0, order="position", group="sequence").admit(routing, stream, training=True)
        assert pooled.dropped() <= apart.dropped()
        fewer += pooled.dropped() < apart.dropped()
        limit = groups * -(-12 * 2 // EXPERTS)
        assert torch.equal(pooled.kept_TA, greedy(routing, "position", {0: limit}, [0] * 12 * groups))
    assert bool(fewer) is (groups > 1)


def test_pooled_equals_apart_when_loads_are_even():
    logits_TE = torch.eye(EXPERTS).double().repeat(6, 1)  # every expert is first choice of as many tokens
    stream, routing = Stream.of_lengths([15, 15]), routed(logits_TE, 1)
    for factor in (0.4, 1.0):
        pooled = Pooled(factor=factor, groups=2).admit(routing, stream, training=True)
        apart = Capacity(factor=factor, order="position", group="sequence").admit(routing, stream, training=True)
        assert pooled.dropped() == apart.dropped()


def test_devices_drop_their_lowest_affinities():
    rule, routing = DeviceCapacity(factor=0.8, devices=3, exempt=0.0), random_routing(40, experts=6)
    admitted = rule.admit(routing, stream_of(40), training=True)
    affinity_TA, device_TA = routing.probs_TE.gather(1, routing.experts_TA), routing.experts_TA // 2
    limit = -int(-0.8 * 80 // 3)
    for device in range(3):
        here_TA = device_TA == device
        kept, gone = (affinity_TA[here_TA & which_TA] for which_TA in (admitted.kept_TA, ~admitted.kept_TA))
        assert len(kept) == min(limit, int(here_TA.sum()))
        assert not len(gone) or kept.min() >= gone.max()
    assert admitted.dropped() > 0


def test_exempt_sequences_keep_all_and_take_places():
    """And are the same in every layer, because they are drawn with the stream."""
    rule, stream = DeviceCapacity(factor=0.7, devices=5, exempt=0.4), Stream.of_lengths([4] * 60)
    exempt_T = (stream.lot_B < 0.4)[stream.sequence_T]
    for _ in range(2):
        admitted = rule.admit(random_routing(240), stream, training=True)
        assert admitted.kept_TA[exempt_T].all()
        limit = -int(-0.7 * 480 // 5)
        for device in range(5):
            here_TA = admitted.experts_TA == device
            exempt, others = (int((here_TA & admitted.kept_TA)[which_T].sum()) for which_T in (exempt_T, ~exempt_T))
            assert others == min(max(limit - exempt, 0), int(here_TA[~exempt_T].sum()))
    assert 0.2 < exempt_T.float().mean() < 0.6
    assert not torch.equal(stream.lot_B, Stream.of_lengths([4] * 60).lot_B)


@pytest.mark.parametrize("factor", [None, 0.5, 1.0, 9.0])
def test_dynamic_capacity_is_tutels(factor):
    """All shares as long as the longest; at most ``A floor(f ceil(N/E))`` with a limit."""
    rule, routing, experts = Dynamic(factor=factor), random_routing(23), stack()
    admitted = rule.admit(routing, stream_of(23), training=False)
    most = int(routing.counts_E().max())
    limit = most if factor is None else min(most, 2 * int(factor * -(-23 // EXPERTS)))
    assert admitted.taken_E().max() == limit
    assert bool(admitted.dropped()) is (limit < most)
    x_TD = torch.randn(23, WIDTH, dtype=torch.float64)
    usage = rule.compute(experts, x_TD, admitted)[1]
    assert usage.rows == usage.peak == EXPERTS * limit
    assert usage.padding == EXPERTS * limit - admitted.taken_E().sum()
    assert usage.waste() == usage.padding / usage.rows > 0


@pytest.mark.parametrize("block", [1, 4, 128])
def test_blocks_are_filled_and_reported(block):
    routing, experts, x_TD = random_routing(23), stack(), torch.randn(23, WIDTH, dtype=torch.float64)
    usage = BlockPadded(block=block).compute(experts, x_TD, routing)[1]
    assert usage.rows == sum(-(-n // block) * block for n in routing.counts_E().tolist())
    assert usage.padding == usage.rows - 46
    assert usage.padding <= EXPERTS * (block - 1)


@pytest.mark.parametrize(
    "rule", params([BlockPadded(block=16), BlockPadded(block=8), Dropless(tile=4), Dynamic(), Dynamic(factor=1.0)])
)
def test_the_budget_expects_the_padding_of_random_routing(rule):
    """Mean of measured rows of zeros over random routings; the expected FLOPs follow from it."""
    experts, x_TD, measured = stack(), torch.randn(60, WIDTH, dtype=torch.float64), []
    for _ in range(60):
        routing = rule.admit(routed(torch.randn(60, EXPERTS).double()), stream_of(60), training=True)
        measured.append(float(rule.compute(experts, x_TD, routing)[1].padding))
    mean, error = torch.tensor(measured).mean().item(), torch.tensor(measured).std().item() / 60**0.5
    assert rule.padding(60, 2, EXPERTS) == pytest.approx(mean, abs=4 * error + 0.03 * mean)
    cost = Experts(experts=EXPERTS, hidden=HIDDEN, overflow=rule).cost(WIDTH, At(tokens=60))
    assert cost.padding_flops == pytest.approx(rule.padding(60, 2, EXPERTS) * 2 * 3 * WIDTH * HIDDEN / 60)


def test_the_budget_knows_what_rounds_do_not_keep():
    plain, rounds = (
        Experts(experts=EXPERTS, hidden=HIDDEN, overflow=rule).cost(WIDTH, At(tokens=60, itemsize=4)).activation_bytes
        for rule in (Dropless(), CappedRounds(cap=64))
    )
    assert plain - rounds == 4 * 2 * (2 * WIDTH + 3 * HIDDEN)


def layer_gradients(rule: Overflow, experts: ExpertStack, x_TD: Tensor, routing: Routing) -> list[Tensor]:
    """Output, then gradients by rows, gates and both stacks."""
    x_TD = x_TD.clone().requires_grad_()
    y_TD, _ = rule.compute(experts, x_TD, routing)
    leaves = (x_TD, routing.gates_TA, experts.up_EDF, experts.down_EFD)
    weight_TD = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(3))
    return [y_TD.detach(), *torch.autograd.grad(y_TD, leaves, weight_TD.to(y_TD.dtype))]


@pytest.mark.parametrize(("load", "dtype"), [*((n, torch.float32) for n in range(20)), (3, torch.bfloat16)])
def test_capped_rounds_are_bitwise_dropless(load, dtype):
    """Twenty random loads: outputs and all gradients, in many rounds and in one; and near the sorted products."""
    tokens, chosen, skew = 30 + 2 * load, 1 + load % 3, 0.3 * (load % 7)
    routing, experts = random_routing(tokens, chosen, skew), stack(torch.float32, width=13)
    routing = replace(routing, gates_TA=routing.gates_TA.detach().float().requires_grad_())
    x_TD = torch.randn(tokens, 13).to(dtype)
    want = layer_gradients(Dropless(tile=8), experts, x_TD, routing)
    for cap in (8, 24, 40):
        rule = CappedRounds(cap=cap, tile=8)
        assert rule.compute(experts, x_TD, routing)[1].rounds > 1
        for g, w in zip(layer_gradients(rule, experts, x_TD, routing), want, strict=True):
            assert torch.equal(g, w)
    for g, w in zip(layer_gradients(Dropless(), experts, x_TD, routing), want, strict=True):
        assert (g.float() - w.float()).abs().max() <= {4: 1e-5, 2: 4e-2}[dtype.itemsize] * w.float().abs().max()


@pytest.mark.parametrize(("tokens", "cap"), [(100, 16), (96, 16), (15, 16), (1, 8), (257, 64)])
def test_an_adversarial_router_costs_rounds_not_rows(tokens, cap):
    """Everything to expert 0: never more than the cap at once, as many rounds as it takes, nothing dropped."""
    routing = routed(torch.tensor([9.0, 0, 0, 0, 0]).double().expand(tokens, -1), 1)
    experts, x_TD = stack(), torch.randn(tokens, WIDTH, dtype=torch.float64)
    y_TD, usage = CappedRounds(cap=cap, tile=8).compute(experts, x_TD, routing)
    assert usage.peak <= cap
    assert usage.rounds == -(-tokens // cap)
    close(y_TD, by_loop(experts, x_TD, routing), 1e-12)


def kept_bytes(rule: Overflow, tokens: int, cap_width: int = 64) -> int:
    """Distinct memory that autograd keeps, less the matrices."""
    experts, routing = stack(torch.float32, width=cap_width), random_routing(tokens)
    owned = {parameter.untyped_storage().data_ptr() for parameter in experts.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in owned:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    x_TD = torch.randn(tokens, cap_width, requires_grad=True)
    routing = replace(routing, gates_TA=routing.gates_TA.detach().float().requires_grad_())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        rule.compute(experts, x_TD, routing)
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def test_rounds_keep_tokens_and_gates_alone():
    """No row of an expert outlives its round: what is kept is the layer's input, however many choices and rounds."""
    assert kept_bytes(CappedRounds(cap=64, tile=16), 300) == 300 * (64 + 2) * 4
    assert kept_bytes(Dropless(), 300) > 600 * (2 * 64 + 2 * HIDDEN) * 4


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: CappedRounds.parse({"cap": 100, "tile": 64}), "cap 100 is no multiple of tile 64"),
        (
            lambda: Experts.parse({"experts": 6, "hidden": 3, "overflow": {"kind": "device_capacity", "devices": 4}}),
            "overflow.devices 4 do not divide experts 6",
        ),
        (lambda: Capacity.parse({"factor": 0.0}), "factor"),
        (lambda: Capacity.parse({"order": "alphabet"}), "order"),
    ],
)
def test_what_cannot_be_is_refused_by_name(made, message):
    with pytest.raises(UsageError, match=message):
        made()


@pytest.mark.parametrize(
    "rule",
    params(
        [Capacity(factor=0.4, order="random"), DeviceCapacity(factor=0.6, devices=3, exempt=0.2), Capacity(factor=0.4)]
    ),
)
def test_recomputation_drops_the_same(rule):
    """Under activation checkpointing: the gradients are those of the decision that was made."""
    from torch.utils.checkpoint import checkpoint

    module = Experts(experts=6, hidden=3, router=GShard(), overflow=rule).build(WIDTH, FP32()).double().train()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x_TD, grads = torch.randn(30, WIDTH, dtype=torch.float64), []
    stream = Stream.of_lengths([3] * 10)
    for again in (False, True):
        module.zero_grad()
        torch.manual_seed(5)
        leaf = x_TD.clone().requires_grad_()
        y_TD, routing = checkpoint(module, leaf, stream, use_reentrant=False) if again else module(leaf, stream)
        y_TD.square().sum().backward()
        assert routing.dropped() > 0
        grads.append([leaf.grad, *(parameter.grad for parameter in module.parameters())])
    for one, two in zip(*grads, strict=True):
        close(one, two, 1e-12)
