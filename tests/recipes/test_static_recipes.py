"""Recipes of the static patterns: counts of parameters, and the plans of their layers."""

import pytest

from sextant import recipes
from sextant.core.cost import At

COUNTS = {
    # millions, to the digits of the source, where the declared parts are all that the source counts
    "sparse-transformer": 95,  # 1904.10509, table of EnWik8
    "moa": 6738,  # Llama 7B's
    "gpt-oss-20b": 20_908,  # model card: 20.91 B
    "longformer": 124,  # without learned positions, global projections and head of its own
    "bigbird": 124,
}


def paper(name: str):
    return recipes.get(name).paper().model


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    assert round(paper(name).cost(At(1)).params / 1e6) == COUNTS[name]


def test_gpt_oss_active_count_without_the_embedding():
    """Its model card: 3.61 B, the embedding left out."""
    model = paper("gpt-oss-20b")
    assert round((model.cost(At(1)).active_params - model.vocab * model.width) / 1e9, 2) == 3.61


def test_gpt_oss_turns():
    windows = [layer.attention.window for layer in paper("gpt-oss-20b").layers]
    assert windows == [128, None] * 12


def test_longformer_gaps_grow_upward():
    layers = paper("longformer").layers
    assert [layer.attention.dilation for layer in layers] == [1] * 6 + [2, 2, 3, 3, 4, 4]
    assert [layer.attention.dilated for layer in layers] == [0] * 6 + [2] * 6


def test_bigbird_draws_anew_in_every_layer():
    assert len({layer.attention.seed for layer in paper("bigbird").layers}) == 12


@pytest.mark.parametrize("length", [4096, 8192])
def test_moa_plan_reads_about_half(length):
    """Shares of the length count as the paper counts them: span over N."""
    shares = [beta for layer in paper("moa").layers for beta in layer.attention.beta]
    assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.01)
    model = paper("moa")
    fixed = model.replace(layers=[x.replace(attention=x.attention.replace(length=length)) for x in model.layers])
    dense = model.replace(schedule="32*full")
    kept = fixed.cost(At(length)).state_bytes / dense.cost(At(length)).state_bytes
    assert kept == pytest.approx(0.5, abs=0.02)
