"""Costs as declared against costs as built and run: parameters on the meta device, FLOPs by a counter, kept bytes by
saved-tensor hooks.

The FLOP counter sees matrix products. It does not know this CPU's fused attention, and a dense call would count keys
that a mask hides; so products are counted by the machine, and attention by the sum of its mask times 2 H (K + V).
"""

import pytest
import torch
from cases import PLAIN, built, examples, model_spec, name, params, random_tokens
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sextant.axes.attention import TABLE as ATTENTION
from sextant.axes.attention import Full, Mixer, Window
from sextant.axes.attention.static import SpanPattern
from sextant.axes.capacity import TABLE as CAPACITY
from sextant.axes.capacity import Dense, Experts, LatentExperts
from sextant.axes.kv import GQA, POSITIONS
from sextant.axes.kv import TABLE as KV
from sextant.axes.numerics import BF16, FP32
from sextant.axes.routing import TABLE as ROUTING
from sextant.axes.routing import Overflow, SoftmaxTopK
from sextant.axes.routing.overflow.limited import Limited
from sextant.axes.stability import NORMS, SandwichNorm
from sextant.axes.stability import TABLE as STABILITY
from sextant.core.cost import At, Cost
from sextant.core.stream import Stream
from sextant.kernels.loss import summed_loss
from sextant.model.spec import Layer
from sextant.recipes import RECIPES

WIDTH = 12
AT = At(tokens=24, itemsize=4)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(build) -> nn.Module:
    with torch.device("meta"):
        return build()


@pytest.mark.parametrize("spec", params(examples(CAPACITY) + examples(KV)))
def test_part_counts_its_parameters(spec):
    assert spec.cost(WIDTH, AT).params == count(on_meta(lambda: spec.build(WIDTH, FP32())))


@pytest.mark.parametrize("spec", params(examples(NORMS) + examples(STABILITY)))
def test_norms_count_their_parameters(spec):
    assert spec.cost(WIDTH, AT).params == count(on_meta(lambda: spec.build(WIDTH)))


@pytest.mark.parametrize("spec", params(examples(ROUTING)))
def test_router_counts_its_parameters(spec):
    assert spec.cost(WIDTH, 7, AT).params == count(on_meta(lambda: spec.build(WIDTH, 7)))


MIXTURES = [
    pytest.param(width.replace(router=router), id=f"{name(router)}-{width.kind}")
    for router in examples(ROUTING)
    for width in (Experts(experts=8, hidden=5, shared=3), LatentExperts(experts=8, hidden=5, latent=4))
]
"""Every router in either width."""


@pytest.mark.parametrize("spec", MIXTURES)
def test_cost_of_a_mixture_counts_its_parameters(spec):
    module = on_meta(lambda: spec.build(WIDTH, FP32()))
    assert spec.cost(WIDTH, AT).params == count(module)
    assert spec.cost(WIDTH, AT).active_params < count(module)


@pytest.mark.parametrize("spec", MIXTURES)
def test_cost_of_a_mixture_counts_its_products(spec, monkeypatch):
    """Of the copies that were sent; in evaluation, where a router draws nothing."""
    monkeypatch.setattr("sextant.axes.capacity.stack.LITTLE", 0)
    module, x_TD = spec.build(WIDTH, FP32()).eval(), torch.randn(AT.tokens, WIDTH)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _, routing = module(x_TD, Stream.of_lengths([AT.tokens]))
    assert int(routing.counts_E().sum()) == AT.tokens * spec.router.top_k
    assert spec.cost(WIDTH, AT).flops * AT.tokens == pytest.approx(counter.get_total_flops(), rel=1e-12)


@pytest.mark.parametrize("spec", params(examples(ATTENTION)))
def test_pattern_counts_its_parameters(spec):
    if isinstance(spec, Mixer):
        assert spec.cost(WIDTH, AT).params == count(on_meta(lambda: spec.build(WIDTH, FP32())))
    else:
        assert spec.cost(WIDTH, PLAIN, AT).params == count(on_meta(lambda: spec.build(WIDTH, PLAIN, FP32())))


@pytest.mark.parametrize("spec", params(examples(CAPACITY)))
def test_active_parameters_are_those_a_token_meets(spec):
    """With one token, the parameters that get a gradient somewhere, by whole matrices of an expert."""
    module = spec.build(WIDTH, FP32())
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    module(torch.randn(1, WIDTH), Stream.of_lengths([1]))[0].square().sum().backward()
    met = 0
    for own, parameter in module.named_parameters():
        stacked = own.endswith(("_EDF", "_EFD"))
        parts = parameter.grad if stacked else [parameter.grad]
        met += sum(part.numel() for part in parts if (part != 0).any())
    assert spec.cost(WIDTH, AT).active_params == met


def models():
    """Every example of every table in some small model, and twins of the published mixtures."""
    kv, ff = GQA(heads=4, kv_heads=2, head_dim=8), Dense(hidden=20)
    for attention in examples(ATTENTION):
        own = None if isinstance(attention, Mixer) else kv
        yield model_spec(Layer.parse({"attention": attention, "kv": own, "feed_forward": ff}), width=WIDTH)
    for any_kv in examples(KV):
        yield model_spec(Layer(kv=any_kv, feed_forward=ff), width=WIDTH, tied=True)  # type: ignore[arg-type]
    for position in examples(POSITIONS):
        yield model_spec(Layer(kv=kv.replace(position=position), feed_forward=ff), width=WIDTH)
    for any_ff in examples(CAPACITY):
        yield model_spec(Layer(kv=kv, feed_forward=any_ff), Layer(kv=kv, feed_forward=ff), width=WIDTH)  # type: ignore[arg-type]
    for residual in examples(STABILITY):
        yield model_spec(Layer(kv=kv, feed_forward=ff, residual=residual), width=WIDTH)  # type: ignore[arg-type]


TWINS = {recipe.name: recipe.twin().model for recipe in RECIPES if recipe.twin().model.cost(AT).params < 10**7}
MODELS = [pytest.param(spec, id=str(index)) for index, spec in enumerate(models())]
MODELS += [pytest.param(spec, id=name) for name, spec in TWINS.items()]


@pytest.mark.parametrize("spec", MODELS)
def test_model_counts_its_parameters(spec):
    assert spec.training_cost(AT).params == count(spec.build(device="meta"))


COUNTABLE = [
    case for case in MODELS if all(isinstance(layer.attention, SpanPattern) for layer in case.values[0].layers)
]
"""What selecting patterns and mixers do depends on the data or the chunk; their own tests count it."""


@pytest.mark.parametrize("spec", COUNTABLE)
def test_model_flops_equal_the_counter(spec, monkeypatch):
    """Forward products by the counter, attention by its masks."""
    # The cost is of the rows that experts are sent; for few rows a CPU runs all experts on all of them instead.
    monkeypatch.setattr("sextant.axes.capacity.stack.LITTLE", 0)
    monkeypatch.setattr(Limited, "admit", Overflow.admit)  # and of all copies, dropped or not
    model, tokens_T = spec.build().eval(), random_tokens(AT.tokens)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.logits(model(tokens_T, Stream.of_lengths([AT.tokens])).hidden_TD)
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "attention" not in str(op))
    position, masks = torch.arange(AT.tokens), 0.0
    for layer in spec.layers:
        heads, _, k_dim, v_dim = layer.kv.shape
        masks += 2 * heads * (k_dim + v_dim) * layer.attention.span.visible(position, position).sum().item()
        if k_dim != v_dim:  # a CPU's fused attention needs equal widths; else the counter sees two dense products
            masks -= 2 * heads * (k_dim + v_dim) * AT.tokens**2
    assert spec.cost(AT).flops * AT.tokens == pytest.approx(products + masks, rel=1e-9)


def test_flops_do_not_depend_on_the_batch():
    """Costs are per token: a packed stream costs the same per token as its sequences."""
    spec = model_spec(Layer(kv=GQA(heads=4, kv_heads=2, head_dim=8), feed_forward=Dense(hidden=20)), width=WIDTH)
    model, totals = spec.build(), []
    for lengths in ([24], [24, 24, 24]):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(random_tokens(sum(lengths)), Stream.of_lengths(lengths))
        totals.append(counter.get_total_flops() / sum(lengths))
    assert totals[0] == pytest.approx(totals[1])


def kept_bytes(spec, numerics, tokens: int) -> int:
    """Distinct memory that autograd keeps between forward and backward, less parameters and their casts."""
    model = spec.build(numerics)
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {tuple(parameter.shape) for parameter in model.parameters()}
    shapes |= {shape[::-1] for shape in shapes if len(shape) == 2}
    kept: dict[int, int] = {}
    tensors = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in owned and tuple(x.shape) not in shapes:
            kept[storage.data_ptr()] = storage.nbytes()
            tensors.append(x)  # keeps the address taken
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = model(random_tokens(tokens), Stream.of_lengths([tokens]))
        loss = summed_loss(out.hidden_TD, model.head_PD, random_tokens(tokens))
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("numerics", [FP32(), BF16()], ids=["fp32", "bf16"])
@pytest.mark.parametrize("feed_forward", params([Dense(hidden=96), Experts(experts=4, hidden=32)]))
def test_activation_bytes_within_a_fifth(feed_forward, numerics):
    """The formula is an estimate: it must lie within 20 % of what autograd keeps."""
    layer = Layer(
        attention=Full(), kv=GQA(heads=4, kv_heads=4, head_dim=16), feed_forward=feed_forward, residual=SandwichNorm()
    )
    spec = model_spec(*[layer] * 6, width=64)
    estimate = spec.cost(At(160, numerics.itemsize)).activation_bytes * 160
    measured = kept_bytes(spec, numerics, 160)
    print(f"kept for backward: declared {estimate:,.0f}, measured {measured:,} ({estimate / measured:.2f})")
    assert estimate == pytest.approx(measured, rel=0.2)


def test_costs_add_and_scale():
    a, b = Cost(1, 2, 3.0, 4, 5, 6.0, 7.0), Cost(10, 20, 30.0, 40, 50, 60.0, 70.0)
    assert a + b == Cost(11, 22, 33.0, 44, 55, 66.0, 77.0)
    assert 3 * a == a + a + a == sum([a, a, a])


@pytest.mark.parametrize("spec", params(examples(CAPACITY)))
def test_exchange_counts_what_travels(spec):
    """A copy per chosen expert, there and back, at the width that travels; dense layers send nothing."""
    sent = []
    module = spec.build(WIDTH, FP32())
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    if isinstance(spec, Experts):
        module.experts.register_forward_hook(lambda m, args, out: sent.append(args[0].numel() + out.numel()))
    module(torch.randn(9, WIDTH), Stream.of_lengths([9]))
    assert spec.cost(WIDTH, AT).exchange_bytes * 9 == 4 * sum(sent)


@pytest.mark.parametrize("pattern", [Full(), Window(window=4), Window(window=3, sinks=2)])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 9])
def test_read_bytes_are_what_the_next_step_reads(pattern, tokens):
    """One decoding step after ``tokens`` tokens: the buffer rows visible to it, with its own."""
    model = built(pattern, GQA(heads=4, kv_heads=2, head_dim=8), Dense(hidden=9), 1)
    cost = model.spec.cost(At(tokens, itemsize=8))
    position = torch.arange(tokens)
    visible = pattern.span.visible(position, position)[-1].sum().item()
    assert cost.read_bytes == visible * 2 * (8 + 8) * 8


def test_a_router_that_takes_all_experts_makes_all_parameters_active():
    spec = Experts(experts=3, hidden=5, router=SoftmaxTopK(top_k=3))
    assert spec.cost(WIDTH, AT).active_params == spec.cost(WIDTH, AT).params
