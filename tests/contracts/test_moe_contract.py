"""What every mixture promises: each router beside the dropless rule, each overflow rule beside the plain router.

No copy is lost unless the rule says so, and then it is counted; nothing depends on neighbours or on later tokens unless
a table below says why; gradients are those of the function that ran (MAI-Base-1, sections 6.2, 8 and 9).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from cases import PLAIN, WIDTH, built, chunked, close, mixture, mixtures, model_spec, part, random_tokens, run
from cases import stirred as stir
from torch import Tensor, nn
from torch.func import functional_call

from sextant.axes.attention import Full
from sextant.axes.capacity import Experts
from sextant.axes.capacity.experts import ExpertsModule
from sextant.axes.numerics import FP32
from sextant.axes.routing import OVERFLOW, TABLE, Capacity, Routing
from sextant.core.stream import Stream
from sextant.model.layer import Layer
from sextant.model.transformer import Transformer
from sextant.train.balance import Balance

T, LENGTHS = 24, [9, 1, 14]

NOT_CAUSAL = {
    "expert_choice": "an expert takes its best tokens of the whole call, later ones among them",
    "capacity": "first choices of later tokens, likelier or luckier ones take places from earlier tokens",
    "device_capacity": "copies of later tokens with a larger affinity take places from earlier ones",
    "dynamic": "with a limit it is capacity",
}
"""Routers and rules in which a later token may decide about an earlier one, while training. The first tokens to come
always win in ``Capacity(order="position")``, ``Pooled`` and whatever drops nothing.
"""


def cases(mixtures_: Iterator[Experts] | list[Experts]) -> list[object]:
    return [pytest.param(feed_forward, id=part(feed_forward)) for feed_forward in mixtures_]


def drops(feed_forward: Experts, training: bool = True) -> bool:
    """Whether its rule may leave copies out."""
    rule = feed_forward.overflow
    return getattr(rule, "factor" if training else "eval_factor", getattr(rule, "factor", None)) is not None


def kinds(feed_forward: Experts) -> set[str]:
    return {feed_forward.router.kind, feed_forward.overflow.kind}


def is_causal(feed_forward: Experts) -> bool:
    by_place = getattr(feed_forward.overflow, "order", None) == "position"
    chooses = feed_forward.router.kind == "expert_choice"
    return not chooses and (not drops(feed_forward) or by_place or not kinds(feed_forward) & set(NOT_CAUSAL))


def is_alone(feed_forward: Experts, training: bool = False) -> bool:
    """Whether a token's output is its own affair, whoever else is in the call."""
    return feed_forward.router.kind != "expert_choice" and not drops(feed_forward, training)


ALL = cases(mixtures())
ALONE = cases([one for one in mixtures() if is_alone(one)])
TRAINING = pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])


def layer(feed_forward: Experts, training: bool = False) -> ExpertsModule:
    """In fp64, with large random matrices and selection biases."""
    module, generator = feed_forward.build(WIDTH, FP32()).double().train(training), torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return stir(module)  # type: ignore[return-value]


def drawn(tokens: int = T, seed: int = 0) -> Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def routed(module: nn.Module, x_TD: Tensor, lengths: list[int] | None = None) -> tuple[Tensor, Routing]:
    """Output and record; whatever is drawn on the way is drawn alike each time."""
    torch.manual_seed(11)
    return module(x_TD, Stream.of_lengths(lengths or [len(x_TD)]))


def masks(routing: Routing) -> tuple[Tensor, Tensor]:
    """Copies that were sent, and those that arrived: bool ``[T, A]``."""
    all_TA = torch.ones_like(routing.experts_TA, dtype=torch.bool)
    sent_TA = all_TA if routing.sent_TA is None else routing.sent_TA
    return sent_TA, sent_TA if routing.kept_TA is None else routing.kept_TA


class Untouched(nn.Module):
    """Experts that give back what they are given, and look at how it comes."""

    def __init__(self, experts: int):
        super().__init__()
        self.experts, self.seen = experts, 0
        self.stacks = (torch.zeros(experts, 1, 1), torch.zeros(experts, 1, 1))

    def one(self, x_ND: Tensor, up_DF: Tensor, down_FD: Tensor) -> Tensor:
        """Through one expert."""
        self.seen += len(x_ND)
        return x_ND.clone()

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        assert counts_E.shape == (self.experts,) and int(counts_E.sum()) == len(x_ND)
        self.seen += len(x_ND)
        return x_ND

    def few(self, x_TD: Tensor, experts_TA: Tensor) -> None:
        """Never: the way through the permutation is what is looked at."""


@TRAINING
@pytest.mark.parametrize("feed_forward", ALL)
def test_counts_permutation_is_undone(feed_forward, training):
    """To the experts and back: each token gets its own row, by the gates of the copies that arrived."""
    module, x_TD = layer(feed_forward, training), drawn()
    _, routing = routed(module, x_TD)
    stack = Untouched(8)
    y_TD, usage = feed_forward.overflow.compute(stack, x_TD, routing)
    close(y_TD, x_TD * (routing.gates_TA * masks(routing)[1]).sum(1, keepdim=True), 1e-12)
    taken = int(routing.taken_E().sum())
    assert stack.seen == usage.rows == taken + usage.padding
    assert 0 < usage.peak <= usage.rows


@TRAINING
@pytest.mark.parametrize("feed_forward", ALL)
def test_counts_add_up(feed_forward, training):
    """Sent = taken + dropped; a rule that drops nothing takes all, and a router that sends all sends T·A."""
    _, routing = routed(layer(feed_forward, training), drawn())
    sent_TA, kept_TA = masks(routing)
    assert not (kept_TA & ~sent_TA).any()
    assert int(routing.counts_E().sum()) == int(sent_TA.sum())
    assert int(routing.taken_E().sum()) + routing.dropped() == int(sent_TA.sum())
    assert routing.dropped() == int((sent_TA & ~kept_TA).sum())
    if routing.sent_TA is None:
        assert int(routing.counts_E().sum()) == T * feed_forward.router.top_k
    if not drops(feed_forward, training):
        assert routing.dropped() == 0


@TRAINING
@pytest.mark.parametrize("feed_forward", ALL)
def test_counts_every_copy_once_in_the_output(feed_forward, training):
    """The output is the sum over the copies that arrived, expert by expert, and the shared part: nothing is lost."""
    module, x_TD = layer(feed_forward, training), drawn()
    y_TD, routing = routed(module, x_TD)
    kept_TA, stack = masks(routing)[1], module.experts
    want_TD = module.shared(x_TD, Stream.of_lengths([T]))[0].clone()
    for t, a in kept_TA.nonzero().tolist():
        one_E = nn.functional.one_hot(routing.experts_TA[t, a], 8)
        want_TD[t] += routing.gates_TA[t, a] * stack(x_TD[t : t + 1], one_E)[0]
    close(y_TD, want_TD, 1e-11)


@TRAINING
@pytest.mark.parametrize("feed_forward", ALL)
def test_counts_gates_in_their_declared_form(feed_forward, training):
    """Finite, not negative, none above the scale; where they are normalised they share it out. Formulas by hand are in
    ``axes/test_routing_formulas.py``.
    """
    _, routing = routed(layer(feed_forward, training), drawn())
    router, gates_TA = feed_forward.router, routing.gates_TA
    scale = getattr(router, "scale", 1.0)
    assert gates_TA.isfinite().all() and (gates_TA >= 0).all() and (gates_TA <= scale * (1 + 1e-12)).all()
    close(routing.probs_TE.sum(-1), torch.ones(T, dtype=torch.float64), 1e-12)
    if getattr(router, "normalize", router.kind in ("gshard", "noisy_topk")):
        norm_T = torch.linalg.vector_norm(gates_TA, getattr(router, "p_norm", 1.0), dim=-1)
        whole_T = masks(routing)[0].all(-1)
        close(norm_T[whole_T], torch.full_like(norm_T[whole_T], scale), 1e-9)


@pytest.mark.parametrize("feed_forward", ALONE)
def test_batch_order_does_not_matter(feed_forward):
    """Rows in another order give rows in that order, and the same choices."""
    module, x_TD, order_T = layer(feed_forward), drawn(), torch.randperm(T)
    y_TD, routing = routed(module, x_TD)
    turned_TD, again = routed(module, x_TD[order_T])
    close(turned_TD, y_TD[order_T], 1e-11)
    assert torch.equal(again.experts_TA, routing.experts_TA[order_T])


def model(feed_forward: Experts) -> Transformer:
    """Two layers, in fp64; a fresh one each time."""
    one = Layer(attention=Full(), kv=PLAIN, feed_forward=feed_forward)
    return stir(model_spec(one, one).build(seed=3).double())  # type: ignore[return-value]


def change_reaches_back(feed_forward: Experts, seed: int) -> float:
    """How far a token at place 16 moves rows before it, while training."""
    own, tokens_T = model(feed_forward).train(), random_tokens(T, seed)
    before_TP = seeded(own, tokens_T, seed)
    tokens_T[16] = (tokens_T[16] + 1 + seed) % 23
    after_TP = seeded(own, tokens_T, seed)
    assert (after_TP[16:] - before_TP[16:]).abs().max() > 1e-3
    return (after_TP[:16] - before_TP[:16]).abs().max().item()


def seeded(own: Transformer, tokens_T: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return run(own, tokens_T, [len(tokens_T)])


@pytest.mark.parametrize("feed_forward", cases([one for one in mixtures() if is_causal(one)]))
def test_past_token_changes_nothing_before_it(feed_forward):
    """In training too, where capacity is short and draws are made."""
    assert max(change_reaches_back(feed_forward, seed) for seed in range(3)) < 1e-11


@pytest.mark.parametrize("kind", NOT_CAUSAL)
def test_past_is_changed_by_what_is_exempt(kind):
    """Some example of the row does leak, so the exemption is needed; nothing else is exempt."""
    exempt = [one for one in mixtures() if kind in kinds(one) and not is_causal(one)]
    assert exempt
    assert max(change_reaches_back(one, seed) for one in exempt for seed in range(6)) > 1e-6


def test_past_is_safe_where_places_go_by_position():
    """A sequence by itself: who comes first is served first, whatever comes later."""
    for group in ("sequence", "tokens"):
        own = mixture(overflow=Capacity(factor=0.5, order="position", group=group))
        assert routed(layer(own, training=True), drawn())[1].dropped() > 0
        assert change_reaches_back(own, 0) < 1e-11


@pytest.mark.parametrize("feed_forward", ALONE)
def test_prefill_chunks_and_decode_agree(feed_forward):
    own, tokens_T = stir(copy.deepcopy(built(Full(), PLAIN, feed_forward))), random_tokens(T)
    whole_TP = run(own, tokens_T, [T])
    for sizes in ([T], [1] * T, [7, 1, 1, 9]):
        close(chunked(own, tokens_T, sizes), whole_TP)


@pytest.mark.parametrize("feed_forward", ALONE)
def test_packed_sequences_equal_separate_ones(feed_forward):
    own, tokens_T = stir(copy.deepcopy(built(Full(), PLAIN, feed_forward))), random_tokens(T)
    packed_TP = run(own, tokens_T, LENGTHS)
    close(packed_TP, torch.cat([run(own, piece, [len(piece)]) for piece in tokens_T.split(LENGTHS)]))
    turned_TP = run(own, torch.cat(tokens_T.split(LENGTHS)[::-1]), LENGTHS[::-1])
    close(torch.cat(turned_TP.split(LENGTHS[::-1])[::-1]), packed_TP)


def gradients(own: Transformer, tokens_T: Tensor, lengths: list[int]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Of every parameter, for a loss in which no two rows weigh alike; and what each layer's experts were sent."""
    torch.manual_seed(11)
    own.zero_grad()
    out = own(tokens_T, Stream.of_lengths(lengths))
    loss = (own.logits(out.hidden_TD).square().sum(-1) * (1 + tokens_T.double())).sum()
    counts = [routing.counts_E() for routing in out.routings.values()]
    loss.backward()
    assert all(torch.equal(r.counts_E(), c) for r, c in zip(out.routings.values(), counts, strict=True))
    return {name_: p.grad.clone() for name_, p in own.named_parameters() if p.grad is not None}, counts


@pytest.mark.parametrize("feed_forward", ALONE)
def test_grads_of_a_packed_batch_are_the_sum(feed_forward):
    """Over its sequences, and so are the counts: accumulation changes neither."""
    own, tokens_T = model(feed_forward).eval(), random_tokens(T)
    whole, counts = gradients(own, tokens_T, LENGTHS)
    parts = [gradients(own, piece, [len(piece)]) for piece in tokens_T.split(LENGTHS)]
    for name_, gradient in whole.items():
        close(gradient, sum(grads.get(name_, 0) for grads, _ in parts), 1e-9)
    for index, counts_E in enumerate(counts):
        assert torch.equal(counts_E, sum(own_counts[index] for _, own_counts in parts))


@pytest.mark.parametrize("feed_forward", ALL)
def test_counts_do_not_change_when_activations_are_computed_again(feed_forward):
    """Nor do gradients, in training, with whatever is drawn; a tally of the step adds each copy once."""
    own, tokens_T = model(feed_forward).train(), random_tokens(T)
    grads, counts = gradients(own, tokens_T, LENGTHS)
    own.recompute = True
    again, recounted = gradients(own, tokens_T, LENGTHS)
    assert all(torch.equal(again[name_], gradient) for name_, gradient in grads.items())
    assert all(torch.equal(a, b) for a, b in zip(recounted, counts, strict=True))
    balance = Balance(own.spec)
    torch.manual_seed(11)
    out = own(tokens_T, Stream.of_lengths(LENGTHS))
    balance.count([out.routings])
    loss = own.logits(out.hidden_TD).sum() + balance.loss(out.routings, Stream.of_lengths(LENGTHS), T)
    loss.backward()
    tallied = [torch.stack(tally.counts).sum(0) for tally in balance.tallies.values()]
    assert all(torch.equal(a, b) for a, b in zip(tallied, counts, strict=True))


@TRAINING
@pytest.mark.parametrize("feed_forward", ALL)
def test_grads_equal_finite_differences(feed_forward, training):
    """Of the rows that come in and of every parameter, along a random direction; no choice flips on the way."""
    module, x_TD = layer(feed_forward, training), drawn()
    leaves = {"x_TD": x_TD, **{name_: p.detach() for name_, p in module.named_parameters()}}
    weight_TD, generator = drawn(seed=4), torch.Generator().manual_seed(9)

    def value(at: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(11)
        given = {name_: x for name_, x in at.items() if name_ != "x_TD"}
        y_TD, routing = functional_call(module, given, (at["x_TD"], Stream.of_lengths([T])))
        return (y_TD * weight_TD).sum() + routing.probs_TE[:, 0].square().sum()

    wanted = {name_: x.clone().requires_grad_() for name_, x in leaves.items()}
    grads = torch.autograd.grad(value(wanted), list(wanted.values()), allow_unused=True)
    for (name_, leaf), gradient in zip(leaves.items(), grads, strict=True):
        along = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        step = 1e-6 * along / along.norm()
        up, down = (value(leaves | {name_: leaves[name_] + sign * step}) for sign in (1, -1))
        want = ((up - down) / 2e-6).item()
        got = 0.0 if gradient is None else (gradient * along).sum().item() / along.norm().item()
        assert got == pytest.approx(want, rel=1e-5, abs=1e-6), name_


@pytest.mark.parametrize("feed_forward", ALL)
@pytest.mark.parametrize("tokens", [1, 2])
def test_hard_few_tokens(feed_forward, tokens):
    """Most experts get nothing: finite outputs and gradients, zero for them."""
    module, x_TD = layer(feed_forward, training=True), drawn(tokens).requires_grad_()
    y_TD, routing = routed(module, x_TD)
    y_TD.square().sum().backward()
    assert y_TD.isfinite().all() and x_TD.grad.isfinite().all()
    idle_E = routing.taken_E() == 0
    assert (module.experts.up_EDF.grad[idle_E] == 0).all() and module.experts.up_EDF.grad.isfinite().all()


@pytest.mark.parametrize("feed_forward", ALL)
def test_hard_rows_repeat_bit_for_bit(feed_forward):
    """Rows all alike, so that an expert gets all or nothing, and huge ones: finite, and the same bits twice."""
    module = layer(feed_forward, training=True)
    for x_TD in (drawn()[:1].expand(T, -1).clone(), 1e3 * drawn()):
        (y_TD, one), (again_TD, two) = routed(module, x_TD), routed(module, x_TD)
        assert y_TD.isfinite().all() and torch.equal(y_TD, again_TD)
        assert torch.equal(one.experts_TA, two.experts_TA) and one.dropped() == two.dropped()


def test_every_row_is_here():
    rows = {row.name for table in (TABLE, OVERFLOW) for row in table}
    assert {kind for one in mixtures() for kind in kinds(one)} == rows
    assert set(NOT_CAUSAL) <= rows
