"""Every router's choice and gates against its paper's formula, one token at a time in plain Python; and its draws."""

import math
import random

import pytest
import torch
from cases import close, examples, model_spec, params
from torch import Tensor

from sextant.axes.capacity import Experts
from sextant.axes.kv import GQA
from sextant.axes.numerics import FP32
from sextant.axes.routing import (
    TABLE,
    ExpertChoice,
    Groups,
    GShard,
    NoisyTopK,
    SelectionBias,
    SigmoidTopK,
    SoftmaxTopK,
    Switch,
)
from sextant.core.stream import Stream
from sextant.model.spec import Layer

EXPERTS, WIDTH, TOKENS = 8, 6, 23
V3 = SigmoidTopK(top_k=4, scale=2.5, groups=Groups(count=4, kept=2, score="top2"))


def built(spec, experts: int = EXPERTS, bias: float = 0.3):
    router, generator = spec.build(WIDTH, experts).double().eval(), torch.Generator().manual_seed(4)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    if isinstance(getattr(router, "bias", None), SelectionBias):
        router.bias.value_E.normal_(std=bias, generator=generator)
    return router


def rows(tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, WIDTH, dtype=torch.float64)


def softmax(z: list[float]) -> list[float]:
    top = max(z)
    e = [math.exp(v - top) for v in z]
    return [v / sum(e) for v in e]


def sigmoid(z: list[float]) -> list[float]:
    return [1 / (1 + math.exp(-v)) for v in z]


def largest(scores: list[float], count: int, among=None) -> list[int]:
    return sorted(range(len(scores)) if among is None else among, key=lambda e: (-scores[e], e))[:count]


def allowed(scores: list[float], groups: Groups | None) -> list[int]:
    """Experts of the kept groups."""
    if groups is None:
        return list(range(len(scores)))
    size = len(scores) // groups.count
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups.count)]
    take = 1 if groups.score == "max" else 2
    worth = [sum(sorted((scores[e] for e in group), reverse=True)[:take]) for group in members]
    return [e for g in largest(worth, groups.kept) for e in members[g]]


def gates_by_hand(spec, router, z: list[float]) -> dict[int, float]:
    """Expert -> gate of one token in evaluation."""
    if isinstance(spec, NoisyTopK):  # equations 3 to 5: the softmax of what is kept
        chosen = largest(z, spec.top_k)
        return dict(zip(chosen, softmax([z[e] for e in chosen]), strict=True))
    p = sigmoid(z) if isinstance(spec, SigmoidTopK) else softmax(z)
    if isinstance(spec, Switch):
        return {(e := largest(p, 1)[0]): p[e]}
    if isinstance(spec, GShard):
        a, b = largest(p, 2)
        return {a: p[a] / (p[a] + p[b]), b: p[b] / (p[a] + p[b])}
    bias = router.bias.value_E.tolist() if spec.bias else [0.0] * len(p)
    score = [s + b for s, b in zip(p, bias, strict=True)]
    chosen = largest(score, spec.top_k, allowed(score, spec.groups))
    exponent = getattr(spec, "p_norm", 1.0)
    norm = sum(p[e] ** exponent for e in chosen) ** (1 / exponent) if spec.normalize else 1.0
    return {e: spec.scale * p[e] / norm for e in chosen}


MORE = [
    V3, V3.replace(normalize=False), V3.replace(bias=False),
    SoftmaxTopK(top_k=4, groups=Groups(count=2, kept=1), bias=True),
    SoftmaxTopK(top_k=2, groups=Groups(count=4, kept=2, score="top2"), normalize=True),
]


@pytest.mark.parametrize("spec", params(s for s in [*examples(TABLE), *MORE] if not isinstance(s, ExpertChoice)))
def test_choice_and_gates_are_the_formula(spec):
    router, x_TD = built(spec), rows()
    routing = router(x_TD)
    for z, chosen, gates in zip(
        (x_TD @ router.weight.T).tolist(), routing.experts_TA.tolist(), routing.gates_TA.tolist(), strict=True
    ):
        want = gates_by_hand(spec, router, z)
        assert set(chosen) == set(want)
        assert gates == pytest.approx([want[e] for e in chosen], rel=1e-12)


@pytest.mark.parametrize("spec", params([SoftmaxTopK(top_k=2), V3]))
def test_probabilities_are_the_formula(spec):
    router, x_TD = built(spec), rows()
    for z, got in zip((x_TD @ router.weight.T).tolist(), router(x_TD).probs_TE.tolist(), strict=True):
        s = softmax(z) if spec.kind == "softmax_topk" else sigmoid(z)
        assert got == pytest.approx([v / sum(s) for v in s], rel=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, 5, 8])
def test_choosing_first_and_the_softmax_over_the_chosen_is_the_normalised_softmax(top_k):
    """Mixtral's and MiniMax's equation, DBRX's and GLaM's: for every z the same."""
    routing = built(SoftmaxTopK(top_k=top_k, normalize=True))(rows())
    close(routing.gates_TA, routing.logits_TE.gather(1, routing.experts_TA).softmax(-1), 1e-14)


# DeepSeek-V3 and V2


def test_gates_of_v3_are_as_many_as_chosen_and_sum_to_the_scale():
    """MOE-1."""
    routing = built(V3)(rows(500))
    assert ((routing.gates_TA > 0) & (routing.gates_TA < 2.5)).all()
    close(routing.gates_TA.sum(1), torch.full((500,), 2.5, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("offset", [0.0, -5.0, 5.0])
@pytest.mark.parametrize(
    "spec", params([SigmoidTopK(top_k=8, groups=Groups(count=8, kept=4, score="top2")),
                    SoftmaxTopK(top_k=6, groups=Groups(count=8, kept=3), bias=True)])
)
def test_no_token_reaches_more_groups_than_are_kept(spec, offset):
    """MOE-2: with a bias far below zero, a masked 0 would win."""
    router = built(spec, experts=32, bias=1.0)
    router.bias.value_E.add_(offset)
    group_TA = router(rows(10_000)).experts_TA // 4
    reached_T = torch.zeros(10_000, 8).scatter(1, group_TA, 1.0).sum(1)
    assert reached_T.max() == spec.groups.kept
    free_TA = built(spec.replace(groups=None), experts=32, bias=1.0)(rows(10_000)).experts_TA // 4
    assert torch.zeros(10_000, 8).scatter(1, free_TA, 1.0).sum(1).max() > spec.groups.kept


def test_an_open_expert_at_minus_infinity_still_beats_a_closed_one():
    scores_TE = torch.tensor([[0.0, 0.0, 1.0, -torch.inf]])
    assert Groups(count=2, kept=1).limit(scores_TE).argsort(descending=True)[0, :2].tolist() == [2, 3]


@pytest.mark.parametrize("spec", params([V3, SoftmaxTopK(top_k=3, bias=True, normalize=True)]))
def test_a_bias_moves_the_choice_and_nothing_else(spec):
    """MOE-3: where the chosen are the same, everything is, bit for bit."""
    router, x_TD = built(spec, bias=0.0), rows(2000)
    before = router(x_TD)
    router.bias.value_E.normal_(std=0.05)
    after = router(x_TD)
    same_T = (before.experts_TA.sort(1).values == after.experts_TA.sort(1).values).all(1)
    assert 100 < same_T.sum() < 1900
    assert torch.equal(before.experts_TA[same_T], after.experts_TA[same_T])
    assert torch.equal(before.gates_TA[same_T], after.gates_TA[same_T])
    assert torch.equal(before.probs_TE, after.probs_TE)
    given = router(x_TD, before.experts_TA)
    assert torch.equal(given.gates_TA, before.gates_TA)


@pytest.mark.parametrize("spec", params([V3, SoftmaxTopK(top_k=3, bias=True)]))
def test_one_constant_on_every_bias_changes_nothing(spec):
    """MOE-4."""
    router, x_TD = built(spec), rows(2000)
    before = router(x_TD)
    router.bias.value_E.add_(3.0)
    assert torch.equal(router(x_TD).experts_TA, before.experts_TA)


@pytest.mark.parametrize("lower", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_the_bias_stays_fp32_when_the_model_is_lowered(lower):
    """MOE-4: saved, without a gradient, and never rounded."""
    router = SigmoidTopK(top_k=2).build(WIDTH, EXPERTS)
    router.bias.value_E.normal_(mean=5.0)
    exact_E = router.bias.value_E.clone()
    lower(torch.nn.Sequential(router))
    assert router.weight.dtype != torch.float32
    assert router.bias.value_E.dtype == torch.float32
    assert torch.equal(router.bias.value_E, exact_E)
    assert torch.equal(router.state_dict()["bias.value_E"], exact_E)
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert not router.bias.value_E.requires_grad
    assert router.double().bias.value_E.dtype == torch.float64


def test_all_experts_with_equal_scores_are_their_mean_times_the_scale():
    """MOE-6: ``N_r = K_r``, beside shared experts."""
    spec = Experts(experts=4, hidden=5, router=SigmoidTopK(top_k=4, scale=2.5), shared=3)
    module = spec.build(WIDTH, FP32()).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    torch.nn.init.zeros_(module.router.weight)
    x_TD, stream = rows(), Stream.of_lengths([TOKENS])
    want_TD = 2.5 * module.experts.all(x_TD).mean(0) + module.shared(x_TD, stream)[0]
    close(module(x_TD, stream)[0], want_TD, 1e-12)


def test_v2_lite_is_a_plain_choice_with_the_probabilities_as_gates():
    """MOE-10; V2's groups and scale are in the formula's test."""
    routing = built(SoftmaxTopK(top_k=6))(rows())
    close(routing.gates_TA, routing.logits_TE.softmax(-1).topk(6).values, 1e-14)


# Random parts


def within(got: float, chance: float, draws: int) -> bool:
    """Five standard deviations of a binomial."""
    return abs(got / draws - chance) < 5 * math.sqrt(chance * (1 - chance) / draws) + 1e-12


@pytest.mark.parametrize("second, per_gate", [("algorithm", 2.0), ("text", 1.0), ("mesh_tf", 5.0), ("always", None)])
@pytest.mark.parametrize("gap", [0.0, 1.0, 2.5])
def test_the_second_expert_is_met_with_its_chance(second, per_gate, gap):
    """``g2`` known: logits ``gap`` and 0, all others far below."""
    torch.manual_seed(0)
    router = GShard(second=second).build(1, 4).double()
    router.weight.data = torch.tensor([[-50.0], [gap], [-50.0], [0.0]], dtype=torch.float64)
    x_TD = torch.ones(20_000, 1, dtype=torch.float64)
    g2 = 1 / (1 + math.exp(gap))
    routing = router(x_TD)
    sent_TA = torch.ones_like(routing.experts_TA) if routing.sent_TA is None else routing.sent_TA
    assert routing.experts_TA[0].tolist() == [1, 3]
    assert sent_TA[:, 0].all()
    assert within(float(sent_TA[:, 1].sum()), 1.0 if per_gate is None else min(1.0, per_gate * g2), 20_000)
    close(routing.gates_TA, sent_TA * torch.tensor([1 - g2, g2], dtype=torch.float64), 1e-12)  # g1 is not made up for
    assert routing.counts_E().tolist() == [0, 20_000, 0, int(sent_TA[:, 1].sum())]
    assert routing.dropped() == 0
    evaluated = router.eval()(x_TD)
    assert evaluated.sent_TA is None
    assert evaluated.counts_E().tolist() == [0, 20_000, 0, 20_000]


@pytest.mark.parametrize("spec", params([Switch(jitter=0.1), SoftmaxTopK(top_k=2, jitter=0.1)]))
def test_jitter_shakes_every_element_of_the_input_while_training(spec):
    torch.manual_seed(0)
    router = spec.build(WIDTH, WIDTH).double()
    router.weight.data = torch.eye(WIDTH, dtype=torch.float64)
    x_TD = rows(5000)
    factor_TD = router(x_TD).logits_TE / x_TD
    assert 0.9 <= factor_TD.min() < 0.901 < 1.099 < factor_TD.max() <= 1.1
    assert factor_TD.mean().item() == pytest.approx(1.0, abs=5 * 0.1 / math.sqrt(3 * 5000 * WIDTH))
    assert factor_TD.var().item() == pytest.approx(0.01 / 3, rel=0.05)
    assert len(factor_TD.flatten().unique()) > 29_000
    assert torch.equal(router.eval()(x_TD).logits_TE, x_TD)


def test_noise_has_the_size_that_its_matrix_says():
    torch.manual_seed(0)
    router = built(NoisyTopK(top_k=2, floor=0.01)).train()
    x_D = torch.randn(WIDTH, dtype=torch.float64)
    routing = router(x_D.expand(20_000, -1))
    size_E = torch.tensor([math.log1p(math.exp(v)) + 0.01 for v in (router.noise @ x_D).tolist()], dtype=torch.float64)
    draws_TE = ((routing.logits_TE - router.weight @ x_D) / size_E).detach()
    assert draws_TE.mean(0).abs().max() < 5 / math.sqrt(20_000)
    assert (draws_TE.var(0) - 1).abs().max() < 5 * math.sqrt(2 / 20_000)
    assert (draws_TE.abs() < 1).double().mean().item() == pytest.approx(0.6827, abs=0.006)
    assert torch.corrcoef(draws_TE.T).fill_diagonal_(0).abs().max() < 0.04
    assert torch.equal(router.eval()(x_D[None]).logits_TE, (x_D[None] @ router.weight.T))


@pytest.mark.parametrize("top_k", [1, 3, 7])
def test_smooth_load_is_appendix_a(top_k):
    """``Phi((x Wg - kth excluding i) / softplus(x Wn))``, with the noisy rivals of this token."""
    torch.manual_seed(2)
    router, x_TD = built(NoisyTopK(top_k=top_k)).train(), rows()
    routing = router(x_TD)
    clean, noise = ((x_TD @ w.T).tolist() for w in (router.weight, router.noise))
    for t, h in enumerate(routing.logits_TE.tolist()):
        for i in range(EXPERTS):
            rival = sorted(h[:i] + h[i + 1 :], reverse=True)[top_k - 1]
            a = (clean[t][i] - rival) / math.log1p(math.exp(noise[t][i]))
            assert routing.load_TE[t, i].item() == pytest.approx(0.5 * math.erfc(-a / math.sqrt(2)), rel=1e-9)


def test_smooth_load_is_how_often_an_expert_stays_when_drawn_again():
    torch.manual_seed(3)
    router, x_TD, draw = built(NoisyTopK(top_k=3)).train(), rows(3), random.Random(0)
    routing = router(x_TD)
    for t, i in ((0, 0), (1, 3), (2, 7)):
        h, clean = routing.logits_TE[t].tolist(), (router.weight[i] @ x_TD[t]).item()
        size = math.log1p(math.exp((router.noise[i] @ x_TD[t]).item()))
        rival = sorted(h[:i] + h[i + 1 :], reverse=True)[2]
        stays = sum(clean + size * draw.gauss(0, 1) > rival for _ in range(20_000))
        assert within(stays, routing.load_TE[t, i].item(), 20_000)


def test_a_noisy_router_starts_at_zero_and_its_noise_alone_chooses():
    layer = Layer(
        kv=GQA(heads=2, kv_heads=1, head_dim=8),
        feed_forward=Experts(experts=EXPERTS, hidden=4, router=NoisyTopK(top_k=2)),
    )
    router = model_spec(layer).build().blocks[0].feed_forward.router
    assert router.weight.count_nonzero() == router.noise.count_nonzero() == 0
    torch.manual_seed(0)
    x_TD = torch.randn(8000, router.weight.shape[1])
    counts_E = router(x_TD).counts_E()
    assert all(within(count, 2 / EXPERTS, 8000) for count in counts_E.tolist())
    assert router.eval()(x_TD).counts_E().tolist() == [8000, 8000, *[0] * 6]


# Experts that choose


@pytest.mark.parametrize("tokens", [1, 2, 7, 23])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_every_expert_takes_its_best_tokens(tokens, top_k):
    router, x_TD = built(ExpertChoice(top_k=top_k)), rows(tokens)
    routing = router(x_TD)
    p = [softmax(z) for z in (x_TD @ router.weight.T).tolist()]
    capacity = math.ceil(tokens * top_k / EXPERTS)
    taken = {(t, e) for e in range(EXPERTS) for t in sorted(range(tokens), key=lambda t, e=e: -p[t][e])[:capacity]}
    assert routing.counts_E().tolist() == routing.taken_E().tolist() == [capacity] * EXPERTS
    got = {
        (t, e): gate
        for t, row in enumerate(zip(routing.experts_TA.tolist(), routing.gates_TA.tolist(), strict=True))
        for e, gate in zip(*row, strict=True) if gate > 0
    }
    assert got == pytest.approx({(t, e): p[t][e] for t, e in taken}, rel=1e-12)


def test_a_later_token_decides_about_an_earlier_one_when_experts_choose():
    router, x_TD = built(ExpertChoice(top_k=1)), rows()
    before = router(x_TD).gates_TA
    x_TD[-1] = 3 * router.weight[int(router(x_TD).experts_TA[0, 0])].detach()
    assert not torch.equal(router(x_TD).gates_TA[:-1], before[:-1])


def test_tied_tokens_are_taken_in_their_order():
    router = ExpertChoice(top_k=2).build(WIDTH, 4)
    torch.nn.init.zeros_(router.weight)
    routing = router(torch.randn(6, WIDTH))
    assert routing.sent_TA.sum(1).tolist() == [4, 4, 4, 0, 0, 0]
