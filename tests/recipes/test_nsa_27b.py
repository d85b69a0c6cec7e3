"""What is published about NSA's model and InfLLM-V2's, read off the recipes."""

import pytest

from sextant import recipes
from sextant.axes.attention import Full
from sextant.core.cost import At


def test_nsa_has_the_published_shapes():
    """2502.11089, section 4.1."""
    model = recipes.get("nsa-27b").paper().model
    layer = model.layers[1]
    assert (len(model.layers), model.width, layer.kv.shape) == (30, 2560, (64, 4, 192, 128))
    assert (layer.feed_forward.experts, layer.feed_forward.router.top_k) == (72, 6)
    assert [part.feed_forward.kind for part in model.layers] == ["dense"] + 29 * ["experts"]
    assert round(model.cost(At(1)).params / 1e9) == 27


@pytest.mark.parametrize(("tokens", "published"), [(8192, 4), (16_384, 6.4), (32_768, 9.1), (65_536, 11.6)])
def test_nsa_spares_the_published_reads(tokens, published):
    """2502.11089, table 4: bytes of full attention over bytes of NSA, one decoding step."""
    layer, at = recipes.get("nsa-27b").paper().model.layers[0], At(tokens)
    full = Full().cost(2560, layer.kv, at).read_bytes
    assert full / layer.attention.cost(2560, layer.kv, at).read_bytes == pytest.approx(published, rel=0.02)


def test_separate_keys_and_values_cost_two_more_projections():
    """Spec sparse-attention 5: ``2 D G (K + V)`` a layer beside gates and phi."""
    layer = recipes.get("nsa-27b").paper().model.layers[0]
    both = [layer.attention.replace(separate_kv=own).cost(2560, layer.kv, At(1)).params for own in (True, False)]
    assert both[0] - both[1] == 2 * 2560 * 4 * (192 + 128)


def test_infllm_v2_switches_without_a_parameter():
    """A dense model's weights load as they are."""
    sparse = recipes.get("infllm-v2-8b").twin().model
    dense = sparse.replace(layers=tuple(layer.replace(attention=Full()) for layer in sparse.layers))
    report = sparse.build(seed=1).load_state_dict(dense.build(seed=2).state_dict())
    assert report.missing_keys == report.unexpected_keys == []
