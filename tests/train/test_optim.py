"""Optimisers: decay by role, which matrices Muon takes, state by name, and one step against the formula."""

import pytest
import torch

from sextant import recipes
from sextant.axes.stability import MuPInit, Role, roles
from sextant.core.errors import CheckpointError
from sextant.train.optim import AdamW, Decay, Muon


@pytest.fixture
def model():
    model = recipes.get("mai-base-1").twin().model.build(seed=1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def groups(optimiser, model):
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: (part, g) for part in optimiser.parts for g in part.param_groups for p in g["params"]}


def test_every_parameter_is_in_exactly_one_group(model):
    for spec in (AdamW(), Muon()):
        found = groups(spec.build(model), model)
        assert set(found) == {name for name, _ in model.named_parameters()}


def test_gains_are_not_decayed_and_roles_have_their_own(model):
    found = groups(AdamW(decay=Decay(default=0.1, attention=0.01, embedding=0.005)).build(model), model)
    expected = {Role.GAIN: 0.0, Role.ATTENTION_IN: 0.01, Role.ATTENTION_OUT: 0.01, Role.EMBEDDING: 0.005}
    for name, role in roles(model).items():
        assert found[name][1]["weight_decay"] == expected.get(role, 0.1)


def test_muon_takes_hidden_matrices_only(model):
    found = groups(Muon().build(model), model)
    by_role = roles(model)
    for name, parameter in model.named_parameters():
        hidden = parameter.ndim == 2 and by_role[name] not in (Role.EMBEDDING, Role.HEAD, Role.ROUTER)
        assert isinstance(found[name][0], torch.optim.Muon) == hidden, name


def test_muon_updates_are_nearly_orthogonal(model):
    name = "blocks.0.attention.kv.q.weight"
    before = model.get_parameter(name).detach().clone()
    Muon(adamw=AdamW(decay=Decay(default=0.0, attention=0.0))).build(model).step(1.0)
    singular = torch.linalg.svdvals(before - model.get_parameter(name).detach())
    assert singular.max() / singular.median() < 2.0


def test_adamw_first_step_is_the_formula(model):
    name = "blocks.0.feed_forward.down.weight"
    parameter = model.get_parameter(name)
    before, gradient = parameter.detach().clone(), parameter.grad.clone()
    AdamW(lr=0.01, eps=1e-8, decay=Decay(default=0.5)).build(model).step(0.5)
    expected = before * (1 - 0.005 * 0.5) - 0.005 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("spec", [AdamW(), Muon()])
def test_state_round_trips_by_name(spec, model):
    first = spec.build(model)
    first.step(1.0)
    saved = {name: tensor.clone() for name, tensor in first.tensors().items()}
    second = spec.build(model)
    second.load(saved)
    restored = second.tensors()
    assert set(saved) == set(restored)
    assert all(torch.equal(saved[name], restored[name]) for name in saved)


def test_state_of_an_unknown_parameter_is_refused(model):
    with pytest.raises(CheckpointError, match=r"unknown parameter: nowhere\.weight"):
        AdamW().build(model).load({"nowhere.weight.exp_avg": torch.ones(2)})


def mup_twin(width: int):
    model = recipes.get("mixtral-8x7b").twin().model
    return model.replace(width=width, init=MuPInit(base_width=32)).build(seed=0)


@pytest.mark.parametrize("spec", [AdamW(lr=0.01, decay=Decay(default=0.1)), Muon(lr=0.02)])
def test_mup_rates_and_decays_by_role(spec):
    """Rate over r and decay times r for what grows with the width; everything else as declared."""
    model = mup_twin(128)
    for name, (part, group) in groups(spec.build(model), model).items():
        role = roles(model)[name]
        plain = role in (Role.EMBEDDING, Role.HEAD, Role.GAIN, Role.BIAS)
        peak = spec.lr if isinstance(part, torch.optim.Muon) or isinstance(spec, AdamW) else spec.adamw.lr
        assert group["lr"] == pytest.approx(peak if plain else peak / 4), name
        decay = 0.0 if role in (Role.GAIN, Role.BIAS) else 0.1
        assert group["weight_decay"] == pytest.approx(decay if plain else 4 * decay), name


def test_mup_steps_are_scaled_and_so_is_the_schedule():
    model = mup_twin(128)
    hidden, plain = "blocks.0.attention.kv.q.weight", "head.weight"
    before = {name: model.get_parameter(name).detach().clone() for name in (hidden, plain)}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    AdamW(lr=0.01, decay=Decay(default=0.0)).build(model).step(0.5)
    moved = {name: (model.get_parameter(name).detach() - was).abs().mean().item() for name, was in before.items()}
    assert moved[plain] == pytest.approx(0.005, rel=1e-3)
    assert moved[hidden] == pytest.approx(0.00125, rel=1e-3)


def test_plain_starts_have_the_declared_rates(model):
    assert {group["lr"] for _, group in groups(AdamW(lr=0.01).build(model), model).values()} == {0.01}
