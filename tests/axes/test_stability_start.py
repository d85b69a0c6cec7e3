"""How layers start: identities, gradients, bounded updates and variances, even routers; spec mai-base-1, section 11."""

import math
from copy import deepcopy

import pytest
import torch
from cases import model_spec, random_tokens
from torch import Tensor

from sextant.axes.capacity import Dense, Experts
from sextant.axes.kv import GQA
from sextant.axes.routing import SoftmaxTopK
from sextant.axes.stability import (
    DeepNorm,
    DeepNormInit,
    DepthScaledInit,
    LayerScale,
    NormalInit,
    PreNorm,
    ReZero,
    SandwichNorm,
    SkipInit,
)
from sextant.core.stream import Stream
from sextant.core.tensorfile import refuse_aliases
from sextant.kernels.loss import summed_loss
from sextant.model.spec import Layer

TOKENS = 48


def stacked(residual, layers=4, init=NormalInit(std=0.1), width=32, feed_forward=Dense(hidden=64), seed=0):  # noqa: B008
    layer = Layer(kv=GQA(heads=4, kv_heads=4, head_dim=8), feed_forward=feed_forward, residual=residual)
    return model_spec(*[layer] * layers, width=width, init=init).build(seed=seed)


def rows_after(model, tokens_T: Tensor) -> list[Tensor]:
    """What enters the first block, and what leaves each."""
    seen: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    with torch.no_grad():
        model(tokens_T, Stream.of_lengths([len(tokens_T)]))
    return seen


def loss_of(model, tokens_T: Tensor) -> Tensor:
    out = model(tokens_T, Stream.of_lengths([len(tokens_T)]))
    return summed_loss(out.hidden_TD, model.head_PD, tokens_T.roll(-1)) / len(tokens_T)


@pytest.mark.parametrize("residual", [ReZero(), SkipInit()], ids=["rezero", "skipinit"])
@pytest.mark.parametrize("feed_forward", [Dense(hidden=64), Experts(experts=6, hidden=16)], ids=["dense", "experts"])
def test_identity_at_the_start_is_exact(residual, feed_forward):
    first, *rest = rows_after(stacked(residual, feed_forward=feed_forward), random_tokens(TOKENS))
    assert len(rest) == 4
    assert all(torch.equal(first, rows) for rows in rest)


def test_layer_scale_starts_near_the_identity():
    first, *rest = rows_after(stacked(LayerScale.at_depth(30)), random_tokens(TOKENS))
    moved = ((rest[-1] - first).norm() / first.norm()).item()
    assert 0 < moved < 1e-3
    assert [LayerScale.at_depth(layers).start for layers in (18, 24, 25)] == [0.1, 1e-5, 1e-6]


def test_skip_init_by_depth_keeps_unit_branches_at_one_unit_of_variance():
    assert SkipInit.at_depth(8).start ** 2 * 16 == pytest.approx(1.0)


@pytest.mark.parametrize("residual", [ReZero(), SkipInit()], ids=["rezero", "skipinit"])
def test_at_first_only_the_scalars_learn_then_all(residual):
    """Inner weights get exact zeros at step 0, the scalars do not; one step later everything learns."""
    model, tokens_T = stacked(residual), random_tokens(TOKENS)
    loss_of(model, tokens_T).backward()
    inner = {name: p.grad.clone() for name, p in model.named_parameters() if p.ndim > 1 and name.startswith("blocks")}
    scalars = {name: p.grad for name, p in model.named_parameters() if name.endswith("scale")}
    assert len(scalars) == (4 if isinstance(residual, ReZero) else 8)
    assert [name for name, grad in inner.items() if (grad != 0).any()] == []
    assert [name for name, grad in scalars.items() if not (grad != 0).all()] == []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= parameter.grad
    model.zero_grad()
    loss_of(model, tokens_T).backward()
    assert [name for name in inner if not (model.get_parameter(name).grad != 0).any()] == []


def test_rezero_has_one_scalar_a_layer_that_both_branches_follow():
    model, tokens_T = stacked(ReZero()).double(), random_tokens(TOKENS)
    assert [name for name in model.state_dict() if "scale" in name] == [
        f"blocks.{i}.around_attention.scale" for i in range(4)
    ]
    refuse_aliases(model.state_dict())
    model = deepcopy(model)  # a copy follows its own
    branch = model.blocks[0].around_attention
    for scale in (0.0, 0.7):
        branch.scale.data.fill_(scale)
        rows = rows_after(model, tokens_T)
        assert torch.equal(rows[0], rows[1]) is (scale == 0)
    loss_of(model, tokens_T).backward()
    got, eps = branch.scale.grad.item(), 1e-6
    sides = []
    for scale in (0.7 + eps, 0.7 - eps):
        branch.scale.data.fill_(scale)
        sides.append(loss_of(model, tokens_T).item())
    assert got == pytest.approx((sides[0] - sides[1]) / (2 * eps), rel=1e-5)


def update_over_rate(layers: int, rate: float) -> float:
    """How far one step of SGD on the branches' matrices moves the network's last rows, over the rate.

    The bound is about these: gains on the residual path, which the paper leaves out, each add an equal share.
    """
    model = stacked(DeepNorm.at_depth(layers), layers, DeepNormInit(), width=16, feed_forward=Dense(hidden=32))
    tokens_T = random_tokens(16)
    before = rows_after(model, tokens_T)[-1]
    loss_of(model, tokens_T).backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("blocks.") and parameter.ndim == 2:
                parameter -= rate * parameter.grad
    after = rows_after(model, tokens_T)[-1]
    return ((after - before).norm() / before.norm()).item() / rate


def test_deep_norm_update_does_not_grow_with_depth():
    """2203.00555: with its factor and its start, one step moves the network by the rate, whatever the depth."""
    shallow, deep = update_over_rate(12, 1e-2), update_over_rate(48, 1e-2)
    print(f"update over rate: 12 layers {shallow:.4f}, 48 layers {deep:.4f}")
    assert 0 < deep < 1.5 * shallow


def growth(init, layers: int) -> float:
    """Variance of the last rows over that of the first, in a stack of pre-norms."""
    model = stacked(PreNorm(), layers, init, width=32)
    with torch.no_grad():
        model.embedding.weight.normal_(generator=torch.Generator().manual_seed(1))
    rows = rows_after(model, random_tokens(TOKENS))
    return (rows[-1].var() / rows[0].var()).item()


def test_depth_scaled_start_bounds_the_variance_of_the_stream():
    """GPT-2's rule: flat in the depth, where one spread for all grows with it."""
    std = 1 / math.sqrt(32)
    bounded = [growth(DepthScaledInit(std=std), layers) for layers in (4, 16, 48)]
    free = [growth(NormalInit(std=std), layers) for layers in (4, 16, 48)]
    print(f"variance over its start at 4, 16, 48 layers: {bounded}, all alike {free}")
    assert max(bounded) < 3 and bounded[-1] < 1.5 * bounded[0]
    assert free[-1] > 4 * free[0]


DEPTH, EXPERTS, CHOSEN, MANY = 12, 32, 2, 256
METHODS = {
    "pre": (PreNorm(), NormalInit(std=0.125)),
    "pre, GPT-2": (PreNorm(), DepthScaledInit(std=0.125)),
    "sandwich, gain 1": (SandwichNorm(), NormalInit(std=0.125)),
    "sandwich, gain 0": (SandwichNorm(attention_gain=0.0), NormalInit(std=0.125)),
    "rezero": (ReZero(), NormalInit(std=0.125)),
    "skipinit": (SkipInit(), NormalInit(std=0.125)),
    "layerscale": (LayerScale.at_depth(DEPTH), NormalInit(std=0.125)),
    "layerscale, deep": (LayerScale.at_depth(48), NormalInit(std=0.125)),
    "deepnorm": (DeepNorm.at_depth(DEPTH), DeepNormInit()),
}


def loads(residual, init, seed: int) -> Tensor:
    """MaxVio of each layer at the start, ``max load / mean load - 1``, on tokens with a Zipf distribution."""
    feed_forward = Experts(experts=EXPERTS, hidden=16, router=SoftmaxTopK(top_k=CHOSEN))
    layer = Layer(kv=GQA(heads=4, kv_heads=4, head_dim=16), feed_forward=feed_forward, residual=residual)
    spec = model_spec(*[layer] * DEPTH, width=64, vocab=512, init=init, embedding_scale=1 / init.std)
    generator = torch.Generator().manual_seed(seed)
    tokens_T = torch.multinomial(1 / torch.arange(1, 513), MANY, replacement=True, generator=generator)
    with torch.no_grad():
        routings = spec.build(seed=seed)(tokens_T, Stream.of_lengths([MANY])).routings
    counts_LE = torch.stack([routing.counts_E() for routing in routings.values()])
    return counts_LE.max(1).values * EXPERTS / (CHOSEN * MANY) - 1


def test_router_load_at_the_start_under_every_method():
    """Section 3.2's table for all of section 11: what starts without attention starts with an even load."""
    found = {name: torch.stack([loads(*method, seed) for seed in range(2)]).mean(0) for name, method in METHODS.items()}
    print("\nMaxVio in layer      " + " ".join(f"{i:5d}" for i in range(0, DEPTH, 3)))
    for name, values in found.items():
        print(f"  {name:18s} " + " ".join(f"{value:5.1f}" for value in values[::3].tolist()))
    last = {name: values[-3:].mean().item() for name, values in found.items()}
    crowded = ("pre", "sandwich, gain 1")
    assert last["pre"] > 2 * found["pre"][0] and last["sandwich, gain 1"] > 1.2 * found["sandwich, gain 1"][0]
    even = [name for name in METHODS if name not in crowded]
    assert [name for name in even if last[name] > 1.4 * found[name][0]] == []
    assert max(last[name] for name in even) < 0.7 * min(last[name] for name in crowded)
