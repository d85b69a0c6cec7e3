"""Transforms against a plain fp64 reference, draws against exact probabilities, seeds against neighbours."""

from __future__ import annotations

import math

import pytest
import torch

from sextant.core.errors import NumericsError, UsageError
from sextant.serve.sampling import Sampling, choose, draw, transformed, uniform


def reference(logits: list[float], sampling: Sampling) -> dict[int, float]:
    """Probabilities by token, by the definitions, one token at a time."""
    scaled = [logit / sampling.temperature for logit in logits]
    peak = max(scaled)
    weights = {i: math.exp(value - peak) for i, value in enumerate(scaled)}
    weights = {i: w for i, w in weights.items() if w >= sampling.min_p}
    order = sorted(weights, key=lambda i: (-weights[i], i))[: sampling.top_k or len(weights)]
    total, mass, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if sampling.top_p < 1 and mass >= sampling.top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    share = sum(weights[i] for i in kept)
    return {i: weights[i] / share for i in kept if weights[i]}


def random_sampling(generator: torch.Generator) -> Sampling:
    def pick(*values: float) -> float:
        return values[int(torch.randint(len(values), (), generator=generator))]

    return Sampling(
        temperature=pick(0.3, 0.8, 1.0, 2.0), top_k=int(pick(0, 0, 1, 2, 5, 100)), top_p=pick(1.0, 0.9, 0.5, 0.01),
        min_p=pick(0.0, 0.0, 0.1, 1.0),
    )


@pytest.mark.parametrize("vocab", [3, 17, 200])
def test_transforms_equal_the_definitions(vocab: int):
    generator = torch.Generator().manual_seed(vocab)
    for _ in range(60):
        rows = 4
        logits_BP = torch.randn(rows, vocab, generator=generator) * 3
        logits_BP[0, : vocab // 2] = logits_BP[0, 0]  # ties
        logits_BP[1, vocab // 2] = -math.inf
        samplings = [random_sampling(generator) for _ in range(rows)]
        probs_BP = transformed(logits_BP, samplings).double().softmax(-1)
        for row, sampling in enumerate(samplings):
            expected = reference(logits_BP[row].tolist(), sampling)
            got = {i: p for i, p in enumerate(probs_BP[row].tolist()) if p}
            assert got.keys() == expected.keys(), sampling
            assert all(abs(got[i] - expected[i]) < 1e-5 for i in got)


def test_draws_have_the_exact_probabilities():
    logits_P = torch.tensor([0.0, 1.0, 2.0, -math.inf, 0.5])
    count = 60_000
    log_weights = transformed(logits_P.expand(count, -1), [Sampling(temperature=1.0)] * count)
    tokens = torch.tensor(draw(log_weights, [uniform(5, 0, position) for position in range(count)]))
    counts_P, probs_P = tokens.bincount(minlength=5).double(), logits_P.double().softmax(-1)
    assert counts_P[3] == 0
    real = probs_P > 0
    chi_square = ((counts_P - count * probs_P)[real] ** 2 / (count * probs_P[real])).sum()
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001


def test_uniform_is_spread_and_keyed_by_all_three():
    values = torch.tensor([uniform(1, 0, position) for position in range(4000)], dtype=torch.float64)
    assert abs(values.mean() - 0.5) < 0.02 and abs(values.var() - 1 / 12) < 0.005
    assert values.min() >= 0 and values.max() < 1
    assert len({uniform(seed, choice, at) for seed in (-(2**63), 7) for choice in (0, 1) for at in (0, 1)}) == 8


def test_the_ends_of_the_unit_interval_draw_allowed_tokens():
    log_weights = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])
    assert draw(log_weights, [0.0]) == [1]
    assert draw(log_weights, [1 - 2.0**-53]) == [2]


def test_a_row_does_not_depend_on_its_neighbours():
    generator = torch.Generator().manual_seed(0)
    for trial in range(40):
        logits_BP = torch.randn(5, 50, generator=generator)
        samplings = [random_sampling(generator) for _ in range(5)] if trial % 2 else [Sampling(temperature=0)] * 5
        uniforms = [uniform(trial, 0, row) for row in range(5)]
        together = choose(logits_BP, samplings, uniforms)
        alone = [choose(logits_BP[i : i + 1], samplings[i : i + 1], uniforms[i : i + 1])[0] for i in range(5)]
        assert together == alone


def test_greedy_and_top_k_take_the_lower_id_of_a_tie():
    logits_BP = torch.tensor([[0.0, 2.0, 2.0, 2.0]])
    assert choose(logits_BP, [Sampling(temperature=0)], [0.9]) == [1]
    assert choose(logits_BP, [Sampling(top_k=1)], [0.999]) == [1]
    assert choose(logits_BP, [Sampling(top_k=2)], [0.999]) == [2]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(bad: float, temperature: float):
    logits_BP = torch.randn(2, 9)
    logits_BP[1, 4] = bad
    with pytest.raises(NumericsError, match="logits are not finite"):
        choose(logits_BP, [Sampling(temperature=temperature)] * 2, [0.5, 0.5])
    with pytest.raises(NumericsError):
        choose(torch.full((1, 9), -math.inf), [Sampling(temperature=temperature)], [0.5])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", math.nan), ("top_k", -1), ("top_p", 0.0),
        ("top_p", 1.01), ("min_p", -0.1), ("min_p", 1.1), ("max_tokens", 0), ("seed", 2**63), ("stop", ("",)),
        ("stop", ("x" * 257,)), ("stop", ("x",) * 17), ("top_k", 1.5), ("stop", "x"),
    ],
)
def test_values_out_of_range_name_their_field(field: str, value: object):
    with pytest.raises(UsageError, match=field) as error:
        Sampling.parse({field: value})
    assert error.value.exit_code == 2


def test_limits_themselves_are_allowed():
    Sampling(temperature=2, top_p=1e-9, min_p=1, seed=-(2**63), stop=("x" * 256,) * 16)
    assert Sampling(temperature=1e-6).greedy and not Sampling(temperature=0.01).greedy
