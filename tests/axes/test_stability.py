"""Norms, their places, and how parameters start."""

import dataclasses
import math

import pytest
import torch
from cases import close, examples, model_spec, name, params
from torch import Tensor

from sextant.axes.capacity import TABLE as CAPACITY
from sextant.axes.kv import GQA
from sextant.axes.stability import (
    INITS,
    NORMS,
    TABLE,
    DeepNorm,
    DepthScaledInit,
    LayerNorm,
    LayerScale,
    PostNorm,
    PreNorm,
    ReZero,
    RMSNorm,
    Role,
    SandwichNorm,
    SkipInit,
    initialise,
    roles,
)
from sextant.axes.stability.init import Matrix, Rule
from sextant.axes.stability.norm import LayerNormModule, RMSNormModule
from sextant.core.stream import Stream
from sextant.model.spec import Layer

WIDTH = 8


def filled(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module.double()


def norm_by_hand(spec, module, x_D: list[float]) -> list[float]:
    n = len(x_D)
    gain = module.gain.tolist()
    if isinstance(spec, RMSNorm):
        scale = 1 / math.sqrt(sum(x * x for x in x_D) / n + spec.eps)
        return [(g + spec.unit_offset) * x * scale for g, x in zip(gain, x_D, strict=True)]
    mean = sum(x_D) / n
    scale = 1 / math.sqrt(sum((x - mean) ** 2 for x in x_D) / n + spec.eps)
    bias = module.bias.tolist() if spec.bias else [0.0] * n
    return [g * (x - mean) * scale + b for g, x, b in zip(gain, x_D, bias, strict=True)]


@pytest.mark.parametrize("spec", params(examples(NORMS)))
def test_norm_by_definition(spec):
    module, x_TD = filled(spec.build(WIDTH)), 3 * torch.randn(4, WIDTH, dtype=torch.float64) + 1
    want = torch.tensor([norm_by_hand(spec, module, row) for row in x_TD.tolist()], dtype=torch.float64)
    close(module(x_TD), want, 1e-12)


@pytest.mark.parametrize("spec", params(examples(NORMS)))
def test_norm_gradients_equal_finite_differences(spec):
    module = filled(spec.build(5))
    names = [key for key, _ in module.named_parameters()]
    weights = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]

    def forward(x, *weights):
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))

    x_TD = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(forward, (x_TD, *weights))


@pytest.mark.parametrize("spec", params(examples(NORMS)))
def test_norm_computes_in_fp32(spec):
    module = spec.build(64)
    module.fill(1.0)
    x_TD = (100 * torch.randn(5, 64)).bfloat16()
    got_TD = module(x_TD)
    assert got_TD.dtype == torch.float32
    close(got_TD.double(), module.double()(x_TD.double()), 1e-5)


@pytest.mark.parametrize("spec", params(examples(NORMS)))
@pytest.mark.parametrize("gain", [0.0, 1.0, 0.25])
def test_fill_sets_the_effective_gain(spec, gain):
    module = filled(spec.build(WIDTH))
    module.fill(gain)
    x_TD = torch.randn(4, WIDTH, dtype=torch.float64)
    one = spec.build(WIDTH).double()
    one.fill(1.0)
    close(module(x_TD), gain * one(x_TD), 1e-13)


def by_definition(spec, branch, x_TD: Tensor, f) -> Tensor:
    if isinstance(spec, PreNorm):
        return x_TD + f(branch.norm(x_TD))
    if isinstance(spec, PostNorm):
        return branch.norm(x_TD + f(x_TD))
    if isinstance(spec, DeepNorm):
        return spec.alpha * branch.norm(x_TD) + spec.beta * f(branch.norm(x_TD))
    if isinstance(spec, LayerScale):
        return x_TD + branch.scale_D * f(branch.norm(x_TD))
    if isinstance(spec, ReZero | SkipInit):
        return x_TD + branch.scale * f(x_TD)
    assert isinstance(spec, SandwichNorm)
    return x_TD + branch.norm_out(f(branch.norm(x_TD)))


@pytest.mark.parametrize("spec", params(examples(TABLE)))
def test_placement_by_definition(spec):
    branches, weight = filled(spec.build(WIDTH)), torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    x_TD, record = torch.randn(4, WIDTH, dtype=torch.float64), object()

    def f(h_TD):
        return torch.tanh(h_TD @ weight), record

    for branch in branches:
        y_TD, returned = branch(x_TD, f)
        assert returned is record
        owner = branches[0] if isinstance(spec, ReZero) else branch
        close(y_TD, by_definition(spec, owner, x_TD, lambda h_TD: f(h_TD)[0]), 1e-14)


@pytest.mark.parametrize("spec", params(examples(TABLE)))
def test_placement_counts_its_norms(spec):
    norms = sum(isinstance(module, RMSNormModule | LayerNormModule) for module in spec.build(WIDTH).modules())
    assert norms == 2 * getattr(spec, "norms", 0)


@pytest.mark.parametrize("spec", params(examples(TABLE)))
def test_dropout_falls_on_the_branch_in_training_only(spec):
    """About p of the branch's outputs are zeroed and the rest scaled by 1/(1-p); evaluation is exact."""
    spec = spec.replace(dropout=0.25)
    branches = spec.build(64)
    for parameter in branches.parameters():
        torch.nn.init.ones_(parameter)
    for branch in branches:
        check_dropout(spec, branch)


def check_dropout(spec, branch):
    x_TD, ones = torch.randn(500, 64), lambda h_TD: (torch.ones_like(h_TD), None)
    still = branch.eval()(x_TD, ones)[0]
    assert torch.equal(still, branch(x_TD, ones)[0])
    if isinstance(spec, PostNorm):
        assert not torch.equal(branch.train()(x_TD, ones)[0], still)
        return
    past = branch.eval()(x_TD, lambda h_TD: (torch.zeros_like(h_TD), None))[0]  # sandwich: the norm of 0 is 0
    added = branch.train()(x_TD, ones)[0] - past
    kept = (still - past).mean()
    assert (added.abs() < 1e-6).float().mean() == pytest.approx(0.25, abs=0.02)
    close(added[added.abs() > 1e-6].mean(), kept / 0.75, 1e-3)


def test_deep_norm_without_branches_is_a_chain_of_norms():
    """Spec minimax-01, section 5.1: the residual path carries the normed row, not the row."""
    spec = DeepNorm(alpha=1.7)
    first, second = filled(spec.build(WIDTH))
    x_TD, nothing = torch.randn(4, WIDTH, dtype=torch.float64), lambda h_TD: (torch.zeros_like(h_TD), None)
    got_TD = second(first(x_TD, nothing)[0], nothing)[0]
    close(got_TD, 1.7 * second.norm(1.7 * first.norm(x_TD)), 1e-14)


@pytest.mark.parametrize("layers", [8, 80])
def test_deep_norm_keeps_gradients_of_early_layers_in_range(layers):
    """Spec minimax-01, section 5.1: at the start, the first layer's gradient is within 10 times the last one's."""
    layer = Layer(
        kv=GQA(heads=4, kv_heads=2, head_dim=8), feed_forward=examples(CAPACITY)[0].replace(hidden=48),  # type: ignore[arg-type]
        residual=DeepNorm.at_depth(layers),
    )
    model = model_spec(*[layer] * layers, width=32, init=examples(INITS)[0]).build(seed=0)
    tokens_T = torch.randint(23, (32,), generator=torch.Generator().manual_seed(0))
    logits_TP = model.logits(model(tokens_T, Stream.of_lengths([32])).hidden_TD)
    torch.nn.functional.cross_entropy(logits_TP[:-1], tokens_T[1:]).backward()
    first, last = (
        torch.cat([p.grad.flatten() for p in model.blocks[i].feed_forward.parameters()]).norm().item() for i in (0, -1)
    )
    print(f"{layers} layers: gradient of the first over the last layer {first / last:.2f}")
    assert 0.1 < first / last < 10


def everything(init):
    """A model with every kind of parameter; large enough for a standard deviation to be measured."""
    kv = GQA(heads=4, kv_heads=2, head_dim=16, bias=True, qk_norm=RMSNorm())
    layers = [
        Layer(kv=kv, feed_forward=ff.replace(hidden=48), residual=SandwichNorm(norm=LayerNorm(), attention_gain=0.5))  # type: ignore[arg-type]
        for ff in examples(CAPACITY)
    ]
    return model_spec(*layers, width=64, vocab=300, init=init)


@pytest.mark.parametrize("init", params(examples(INITS)))
def test_measured_start_of_every_role(init):
    """Matrices within 5 standard errors of their declared spread and of mean 0; gains and biases as set."""
    model = everything(init.replace(std=0.03)).build(seed=5)
    table, by_role, constants = model.init_table, roles(model), {Role.GAIN: set(), Role.BIAS: set()}
    assert set(by_role.values()) == set(Role)
    for path, parameter in model.named_parameters():
        if not table[path]:
            constants[by_role[path]] |= set(parameter.flatten().tolist())
        for part in table[path]:
            values, std = parameter.detach().flatten(), part.rule.std
            assert values.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * len(values))), path
            assert abs(values.mean().item()) <= 5 * std / math.sqrt(len(values)), path
    assert constants == {Role.GAIN: {0.5, 1.0}, Role.BIAS: {0.0}}


def rule(init, role, **known):
    """A line of the table, for a matrix of 64 by 192 in a model of width 64 and 8 layers."""
    plain = Matrix(role, inputs=64, outputs=192, values=False, width=64, layers=8)
    return init.rule(dataclasses.replace(plain, **known))


def test_depth_scaled_writers():
    init = DepthScaledInit(std=0.02)
    assert rule(init, Role.ATTENTION_OUT) == rule(init, Role.FF_OUT) == Rule(pytest.approx(0.005))
    assert rule(init, Role.FF_IN) == rule(init, Role.EMBEDDING) == Rule(0.02)


@pytest.mark.parametrize("init", params(examples(INITS)))
def test_the_seed_decides_the_start(init):
    spec = everything(init)
    one, same, other = (spec.build(seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])


def test_initialise_leaves_nothing_unset():
    spec = everything(examples(INITS)[0])
    model = spec.build()
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    initialise(model, model.init_table, torch.Generator().manual_seed(0))
    assert [path for path, parameter in model.named_parameters() if parameter.isnan().any()] == []


@pytest.mark.parametrize("gain", [0.0, 1.0])
def test_sandwich_adds_one_unit_of_variance_per_active_sublayer(gain):
    """Two active sublayers a layer at gain 1, one at gain 0; so a deep stack grows like a sum, not like a product."""
    layer = Layer(
        kv=GQA(heads=4, kv_heads=4, head_dim=16),
        feed_forward=examples(CAPACITY)[0].replace(hidden=128),  # type: ignore[arg-type]
        residual=SandwichNorm(attention_gain=gain),
    )
    model = model_spec(*[layer] * 12, width=64, init=examples(INITS)[0]).build(seed=0)
    variances: list[float] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: variances.append(out[0].var().item()))
    with torch.no_grad():
        model(torch.randint(23, (256,)), Stream.of_lengths([256]))
    per_layer = (variances[-1] - variances[0]) / 11
    print(f"gain {gain:g}: variance per layer {per_layer:.2f}, after each layer {[round(v, 1) for v in variances]}")
    assert per_layer == pytest.approx(1 + gain, rel=0.35)


def test_ids_of_the_examples_differ():
    """The tables' examples are told apart in reports."""
    for table in (TABLE, NORMS, INITS, CAPACITY):
        assert len({name(example) for example in examples(table)}) == len(examples(table))
