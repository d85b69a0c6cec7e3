"""MoA's search: the influence formula, the integer program against every plan, and a trained model end to end."""

import importlib.util
from collections.abc import Sequence
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from cases import DENSE, PLAIN, model_spec
from torch import Tensor

from sextant.axes.attention import Window
from sextant.axes.capacity import Dense
from sextant.axes.kv import GQA
from sextant.axes.stability import NormalInit
from sextant.core.errors import UsageError
from sextant.core.stream import Stream
from sextant.kernels.attention import Span
from sextant.lab.moa import Problem, Rules, by_program, greedily, influence, profile, search, solve, with_spans
from sextant.model.spec import Layer

HAS_SCIPY = importlib.util.find_spec("scipy") is not None
needs_scipy = pytest.mark.skipif(not HAS_SCIPY, reason="scipy is an extra")


def test_influence_is_the_first_order_price_of_masking_one_key():
    """By hand: the row without the key, renormalised, less the row, times the gradient."""
    logits_HTS = torch.randn(2, 5, 5, dtype=torch.float64).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    weights_HTS, gradient_HTS = logits_HTS.softmax(-1), torch.randn(2, 5, 5, dtype=torch.float64)
    got = influence(weights_HTS, gradient_HTS)
    for h, t, s in product(range(2), range(1, 5), range(5)):
        row = weights_HTS[h, t].clone()
        row[s] = 0
        want = gradient_HTS[h, t] @ (row / row.sum() - weights_HTS[h, t])
        assert got[h, t, s].item() == pytest.approx(want.item(), abs=1e-12)
    assert torch.equal(got[:, 0, 0], -gradient_HTS[:, 0, 0])


def problem(heads: int, rules: int, seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(2, rules, generator=generator, dtype=torch.float64).sort(-1).values
    losses = torch.randn(heads, rules, generator=generator, dtype=torch.float64).abs().cumsum(-1).flip(-1)
    return Problem(losses, shares, [float(row.mean()) for row in shares])


def fits(case: Problem, plan: Sequence[int]) -> bool:
    bounds = torch.tensor(case.bounds, dtype=torch.float64)
    return bool((case.shares[:, list(plan)].mean(-1) <= bounds + 1e-6).all())  # the solver's own tolerance


def lost(case: Problem, plan: list[int]) -> float:
    assert fits(case, plan)
    return float(case.losses[range(len(plan)), plan].sum())


@needs_scipy
@pytest.mark.parametrize("seed", range(6))
def test_program_finds_the_best_of_all_plans(seed):
    case = problem(4, 4, seed)
    plans = [plan for plan in product(range(4), repeat=4) if fits(case, plan)]
    best = min(float(case.losses[range(4), list(plan)].sum()) for plan in plans)
    assert lost(case, by_program(case)) == pytest.approx(best, abs=1e-9)


@needs_scipy
@pytest.mark.parametrize("seed", range(4))
def test_greedy_plans_fit_and_come_near(seed):
    """Between the best plan and one rule for all, and nearer to the former."""
    case = problem(24, 6, seed)
    best, greedy = lost(case, by_program(case)), lost(case, greedily(case))
    alike = [rule for rule in range(6) if fits(case, [rule])]
    uniform = min(float(case.losses[:, rule].sum()) for rule in alike)
    assert best - 1e-9 <= greedy < (best + uniform) / 2


def test_without_scipy_the_search_is_greedy(monkeypatch):
    monkeypatch.setattr("sextant.lab.moa.find_spec", lambda name: None)
    case = problem(6, 4, 0)
    assert solve(case) == greedily(case)


def test_a_density_that_nothing_meets_is_refused():
    case = problem(3, 3, 1)
    with pytest.raises(UsageError, match="no plan fits the density"):
        solve(Problem(case.losses, case.shares, [0.0, 1.0]))


def test_rules_are_spans_in_whole_blocks():
    rules = Rules(alphas=(8, 16), betas=(0.0, 0.5), sinks=4, block=8)
    assert rules.spans(32) == [Span(8, 4), Span(20, 4), Span(12, 4), Span(28, 4)]


def test_only_full_attention_is_profiled():
    model = model_spec(Layer(attention=Window(window=3), kv=PLAIN, feed_forward=DENSE)).build()
    with pytest.raises(UsageError, match=r"layers\[0\]\.attention"):
        profile(model, torch.zeros(1, 4).long(), torch.zeros(1, 4).long(), 1)


LAG, VOCAB = 20, 23


def batch(rows: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random tokens that repeat after ``LAG``; the loss is on those that do."""
    first = torch.randint(VOCAB, (rows, LAG), generator=torch.Generator().manual_seed(seed))
    tokens_NT = first.repeat(1, length // LAG + 2)[:, : length + 1]
    targets_NT = tokens_NT[:, 1:].clone()
    targets_NT[:, : LAG - 1] = -100
    return tokens_NT[:, :-1], targets_NT


def loss_of(model, tokens_NT: Tensor, targets_NT: Tensor) -> Tensor:
    stream = Stream.of_lengths([tokens_NT.shape[1]] * len(tokens_NT))
    logits_TP = model.logits(model(tokens_NT.flatten(), stream).hidden_TD)
    return F.cross_entropy(logits_TP, targets_NT.flatten(), ignore_index=-100)


def trained():
    """Two layers of four heads that learn to look back ``LAG`` tokens."""
    kv = GQA(heads=4, kv_heads=4, head_dim=16)
    layer = Layer(kv=kv, feed_forward=Dense(hidden=32))
    model = model_spec(layer, layer, width=48, init=NormalInit(std=0.1)).build(seed=0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for step in range(300):
        loss = loss_of(model, *batch(8, 44, step))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if loss.item() < 0.05:
            break
    return model


def test_spans_of_a_trained_model():
    """At half the keys the plan keeps what the model has learnt; one window for all heads does not."""
    model, rules = trained(), Rules(alphas=(2, 4, 8, 16, 24), betas=(0.0, 0.25, 0.5, 1.0), sinks=1, block=2)
    profiles = [profile(model, *batch(4, length, 1000 + length), rules.sinks) for length in (44, 64)]
    check, density = profile(model, *batch(4, 56, 1056), rules.sinks), 0.5
    assert all(torch.isfinite(each.rise_LGS).all() for each in profiles)
    plan = search(profiles, check, rules, density)
    sparse = with_spans(model.spec, plan, length=64)
    reaches = [reach for layer in sparse.layers for reach in layer.attention.reaches(layer.kv)]
    full = Span().mean_keys(64)
    assert sum(reach.mean_keys(64) for reach in reaches) / len(reaches) <= density * full + 1e-9
    assert len({reach.window for reach in reaches}) > 1
    window = max(w for w in range(1, 64) if Span(w, 1).mean_keys(64) <= density * full)
    shorter = min(window, LAG - 2)
    uniform = model.spec.replace(layers=[
        layer.replace(attention=Window(window=shorter, sinks=1)) for layer in model.spec.layers
    ])
    data = batch(8, 64, 5)
    with torch.no_grad():
        dense, ours, alike = (
            float(loss_of(_like(model, spec), *data)) for spec in (model.spec, sparse, uniform)
        )
    print(f"dense {dense:.3f}, plan {ours:.3f}, windows of {shorter} {alike:.3f}")
    assert dense < 0.5 and ours < dense + 0.3 and alike > ours + 1.0


def _like(model, spec):
    """The same weights under other spans: none are added or lost."""
    other = spec.build(seed=1)
    other.load_state_dict(model.state_dict())
    return other
