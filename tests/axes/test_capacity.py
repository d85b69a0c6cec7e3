"""Feed-forward options: every example against an independent token-by-token computation, gradients, odd loads, and
what is particular to experts in a latent."""

import pytest
import torch
import torch.nn.functional as F
from cases import close, examples, params
from torch import Tensor

from sextant.axes.capacity import TABLE, Dense, Experts, LatentExperts
from sextant.axes.numerics import BF16, FP32
from sextant.axes.routing import SoftmaxTopK
from sextant.core.errors import UsageError
from sextant.core.stream import Stream

WIDTH = 6
ALL = params(examples(TABLE))
ROUTED = params(example for example in examples(TABLE) if isinstance(example, Experts))


def build(spec, std: float = 0.5, width: int = WIDTH):
    module = spec.build(width, FP32()).double()
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return module


def rows(tokens: int = 13) -> Tensor:
    return torch.randn(tokens, WIDTH, dtype=torch.float64)


def feed(module, x_TD: Tensor):
    """The rows as one sequence."""
    return module(x_TD, Stream.of_lengths([len(x_TD)]))


ACTS = {
    "swiglu": lambda g, v: g * torch.sigmoid(g) * v,
    "geglu": lambda g, v: F.gelu(g) * v,
    "geglu_tanh": lambda g, v: F.gelu(g, approximate="tanh") * v,
    "gelu": lambda g, v: F.gelu(g),
    "gelu_tanh": lambda g, v: F.gelu(g, approximate="tanh"),
    "relu": lambda g, v: g.clamp_min(0),
    "relu2": lambda g, v: g.clamp_min(0) ** 2,
}


def dense_by_hand(module, x_D: Tensor) -> Tensor:
    up_F = module.up.weight @ x_D
    gate_F = up_F if module.gate is None else module.gate.weight @ x_D
    return module.down.weight @ ACTS[module.spec.activation](gate_F, up_F)


def experts_by_hand(module, x_D: Tensor) -> Tensor:
    """One token: choose, run each chosen expert, add up by gates."""
    spec = module.spec
    probs_E = (module.router.weight @ x_D).softmax(0)
    chosen = sorted(range(spec.experts), key=lambda e: -probs_E[e].item())[: spec.router.top_k]
    gates = {e: probs_E[e] / (sum(probs_E[c] for c in chosen) if spec.router.normalize else 1) for e in chosen}
    latent = isinstance(spec, LatentExperts)
    c = module.compress.weight @ x_D if latent else x_D
    total = torch.zeros_like(c)
    for e, gate in gates.items():
        up = c @ module.experts.up_EDF[e]
        halves = up.chunk(2) if "glu" in spec.activation else (up, up)
        total = total + gate * spec.router.scale * (ACTS[spec.activation](*halves) @ module.experts.down_EFD[e])
    y_D = module.expand.weight @ total if latent else total
    return y_D + dense_by_hand(module.shared, x_D) if spec.shared else y_D


@pytest.mark.parametrize("spec", ALL)
def test_equals_a_token_by_token_computation(spec):
    module, x_TD = build(spec), rows()
    by_hand = experts_by_hand if isinstance(spec, Experts) else dense_by_hand
    close(feed(module, x_TD)[0], torch.stack([by_hand(module, x_D) for x_D in x_TD]), 1e-12)


@pytest.mark.parametrize("name", ACTS)
def test_every_activation(name):
    module = build(Dense(hidden=5, activation=name))
    x_TD = rows()
    close(feed(module, x_TD)[0], torch.stack([dense_by_hand(module, x_D) for x_D in x_TD]), 1e-12)


@pytest.mark.parametrize("spec", ALL)
def test_gradients_equal_finite_differences(spec):
    module = build(spec)
    names, stream = [name for name, _ in module.named_parameters()], Stream.of_lengths([3])
    weights = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]

    def forward(x_TD, *weights):
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x_TD, stream))[0]

    assert torch.autograd.gradcheck(forward, (rows(3).requires_grad_(), *weights), fast_mode=True)


@pytest.mark.parametrize("spec", ALL)
def test_order_of_rows_does_not_matter(spec):
    module, x_TD, order = build(spec), rows(), torch.randperm(13)
    close(feed(module, x_TD[order])[0], feed(module, x_TD)[0][order], 1e-12)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("spec", ALL)
def test_few_tokens(spec, tokens):
    module, x_TD = build(spec), rows()
    close(feed(module, x_TD[:tokens])[0], feed(module, x_TD)[0][:tokens], 1e-12)


@pytest.mark.parametrize("little", [0, 1 << 21])
@pytest.mark.parametrize("tokens", [1, 2, 3, 13])
@pytest.mark.parametrize("spec", ROUTED)
def test_the_ways_without_gradients_equal_training(spec, tokens, little, monkeypatch):
    """Each copy by itself, all experts on all rows, sorted rows: chosen by counts, the same rows come out."""
    monkeypatch.setattr("sextant.axes.capacity.stack.LITTLE", little)
    module, x_TD = build(spec), rows()[:tokens]
    with torch.no_grad():
        y_TD, routing = feed(module, x_TD)
    close(y_TD, feed(module, x_TD)[0].detach(), 1e-12)
    assert torch.equal(routing.experts_TA, feed(module, x_TD)[1].experts_TA)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_a_joined_layer_gives_the_same_and_keeps_its_weights(activation):
    module, x_TD = build(Dense(hidden=5, activation=activation)).requires_grad_(False), rows()
    want, names = feed(module, x_TD)[0], list(module.state_dict())
    module.join()
    close(feed(module, x_TD)[0], want, 1e-12)
    assert list(module.state_dict()) == names
    module.up.weight.mul_(2)  # a view of the joint matrix: what is loaded into a layer reaches the product
    close(feed(module, x_TD)[0], 2 * want if activation == "swiglu" else module.down(F.gelu(module.up(x_TD))), 1e-12)


@pytest.mark.parametrize("spec", ROUTED)
def test_unused_experts_get_a_zero_gradient(spec):
    """Every token alike: the chosen experts take all, the others get zeros, not None and not NaN."""
    module, x_TD = build(spec), rows(1).expand(9, -1)
    y_TD, routing = feed(module, x_TD)
    y_TD.square().sum().backward()
    used = set(routing.experts_TA[0].tolist())
    assert sorted(routing.counts_E().tolist()) == [0] * (spec.experts - len(used)) + [9] * len(used)
    for stack in (module.experts.up_EDF, module.experts.down_EFD):
        for expert, grad in enumerate(stack.grad):
            assert grad.isfinite().all()
            assert bool((grad != 0).any()) is (expert in used)


@pytest.mark.parametrize("spec", ROUTED)
def test_router_learns_from_the_output(spec):
    module = build(spec)
    feed(module, rows())[0].square().sum().backward()
    assert module.router.weight.grad.abs().sum() > 0


def test_latent_of_full_width_with_identities_is_the_plain_mixture():
    plain = build(Experts(experts=4, hidden=5))
    latent = build(LatentExperts(experts=4, hidden=5, latent=WIDTH))
    eye = torch.eye(WIDTH, dtype=torch.float64)
    latent.load_state_dict({**plain.state_dict(), "compress.weight": eye, "expand.weight": eye})
    x_TD = rows()
    close(feed(latent, x_TD)[0], feed(plain, x_TD)[0], 1e-13)


def test_one_latent_expert_is_three_dense_steps():
    module, x_TD = build(LatentExperts(experts=1, hidden=5, latent=4, router=SoftmaxTopK(top_k=1))), rows()
    gate, value = (F.linear(x_TD, module.compress.weight) @ module.experts.up_EDF[0]).chunk(2, -1)
    want_TD = F.linear((F.silu(gate) * value) @ module.experts.down_EFD[0], module.expand.weight)
    close(feed(module, x_TD)[0], want_TD, 1e-13)


def test_compression_does_not_reach_the_router():
    module, x_TD = build(LatentExperts(experts=4, hidden=5, latent=4)), rows()
    y_TD, before = feed(module, x_TD)
    with torch.no_grad():
        module.compress.weight.add_(torch.randn_like(module.compress.weight))
    z_TD, after = feed(module, x_TD)
    assert torch.equal(before.experts_TA, after.experts_TA)
    assert torch.equal(before.gates_TA, after.gates_TA)
    assert (y_TD - z_TD).abs().max() > 1e-2


def test_expand_after_the_sum_equals_expand_before_it():
    module, x_TD = build(LatentExperts(experts=4, hidden=5, latent=4, router=SoftmaxTopK(top_k=3))), rows()
    y_TD, routing = feed(module, x_TD)
    gates_TE = torch.zeros(13, 4, dtype=torch.float64).scatter(1, routing.experts_TA, routing.gates_TA)
    c_TR = module.compress(x_TD)
    want_TD = torch.zeros_like(y_TD)
    for e in range(4):
        gate, value = (c_TR @ module.experts.up_EDF[e]).chunk(2, -1)
        want_TD += gates_TE[:, e, None] * module.expand((F.silu(gate) * value) @ module.experts.down_EFD[e])
    close(y_TD, want_TD, 1e-12)


def test_gates_reach_the_combine_in_fp32_under_bf16():
    """Eight equal experts of 1/8 each sum to the one expert to fp32 digits of bf16 rows, not to bf16 digits."""
    spec = Experts(experts=8, hidden=6, router=SoftmaxTopK(top_k=8))
    module = spec.build(WIDTH, BF16())
    torch.nn.init.zeros_(module.router.weight)
    one_1DF, back_1FD = torch.randn(1, WIDTH, 12), torch.randn(1, 6, WIDTH)
    with torch.no_grad():
        module.experts.up_EDF.copy_(one_1DF.expand(8, -1, -1))
        module.experts.down_EFD.copy_(back_1FD.expand(8, -1, -1))
    x_TD = torch.randn(5, WIDTH)
    y_TD = feed(module, x_TD)[0]
    up_TF = F.linear(x_TD.bfloat16(), one_1DF[0].bfloat16().T)
    h_TF = F.silu(up_TF[:, :6]) * up_TF[:, 6:]
    assert y_TD.dtype == torch.float32
    close(y_TD, F.linear(h_TF, back_1FD[0].bfloat16().T).float(), 1e-6)


@pytest.mark.parametrize("spec", ROUTED)
def test_more_choices_than_experts_are_refused(spec):
    with pytest.raises(UsageError, match=rf"router.top_k {spec.experts + 1} exceeds experts {spec.experts}"):
        spec.replace(router=SoftmaxTopK(top_k=spec.experts + 1))
