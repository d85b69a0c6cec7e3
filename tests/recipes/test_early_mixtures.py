"""Mixtures before decoders had them: published counts of other networks, from the layers that ours share with them."""

import pytest

from sextant import recipes
from sextant.axes.capacity import Experts
from sextant.core.cost import At
from sextant.recipes import gshard, shazeer_2017, switch_base


def test_switch_base_with_its_encoder():
    """2101.03961 prints 7,410 M; T5's relative biases, a few hundred numbers, are left out."""
    spec = recipes.get("switch-base").paper().model
    total = switch_base.encoder_decoder(spec)
    routers = 2 * sum(
        layer.feed_forward.router.cost(spec.width, 128, At(1)).params
        for layer in spec.layers if isinstance(layer.feed_forward, Experts)
    )
    assert total == 7_415_205_888
    assert round((total - routers) / 1e9, 2) == 7.41 and routers == 12 * 768 * 128


@pytest.mark.parametrize(("experts", "millions"), [(32, 37.8), (256, 272.9)])
def test_the_mixtures_of_2017_between_their_lstms(experts, millions):
    """1701.06538, table 7: parameters without embedding and softmax, of MoE-32 and MoE-256."""
    assert round(shazeer_2017.published_millions(experts), 1) == millions
    layer = recipes.get("shazeer-2017").paper().model.layers[0]
    assert layer.feed_forward == shazeer_2017.mixture(256, 1024)


GSHARD = [(2048, 36, 600), (512, 36, 150), (128, 36, 37), (2048, 12, 200), (512, 12, 50), (128, 12, 12.5)]


@pytest.mark.parametrize(("experts", "depth", "billions"), GSHARD)
def test_gshard_is_mostly_experts(experts, depth, billions):
    """2006.16668, table 1, rounded there: experts alone, in every second layer, are within 5 % of what it prints."""
    spec = gshard.sized(experts, depth)
    mixtures = [layer.feed_forward for layer in spec.layers if isinstance(layer.feed_forward, Experts)]
    stored = sum(mixture.expert_cost(spec.width, At(1)).params for mixture in mixtures)
    assert stored == depth // 2 * experts * 2 * 1024 * 8192
    assert stored / 1e9 == pytest.approx(billions, rel=0.05)


@pytest.mark.parametrize("name", ["switch-base", "gshard", "glam"])
@pytest.mark.parametrize("size", ["paper", "twin"])
def test_every_second_layer_is_a_mixture_with_places(name, size):
    layers = getattr(recipes.get(name), size)().model.layers
    kinds = [layer.feed_forward.kind for layer in layers]
    assert kinds == len(layers) // 2 * ["dense", "experts"]
    assert {layer.feed_forward.overflow.kind for layer in layers[1::2]} == {"capacity"}
