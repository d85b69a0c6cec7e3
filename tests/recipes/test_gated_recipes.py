"""The memory that adds nothing and the gates of published size; both beside bases of the published size."""

import pytest

from sextant import recipes
from sextant.axes.attention import Seer, SeerR
from sextant.core.cost import At
from sextant.train.optim import learning, train_only


def counts(name: str) -> tuple[int, int]:
    """Parameters of the base, and of what the run trains, by the names of a model on the meta device."""
    run = recipes.get(name).paper()
    model = run.model.build(run.numerics, device="meta")
    learnt = train_only(model, run.train_only) if run.train_only else 0
    return sum(p.numel() for p in model.parameters()) - learnt, learnt


@pytest.mark.parametrize(
    ("name", "base", "gates"),
    [("infllm", 8.03, 0.0), ("seer-attention", 8.03, 50.3), ("seer-attention-r", 8.19, 33.0)],
)
def test_bases_and_gates_have_the_published_sizes(name, base, gates):
    """Billions (Qwen3 8B is published as 8.2 B), and millions (spec sparse-attention 8, 18)."""
    others, learnt = counts(name)
    assert round(others / 1e9, 2) == base and round(learnt / 1e6, 1) == gates


@pytest.mark.parametrize("name", ["seer-attention", "seer-attention-r"])
@pytest.mark.parametrize("size", ["paper", "twin"])
def test_gates_and_nothing_else_are_trained(name, size):
    run = getattr(recipes.get(name), size)()
    model = run.model.build(device="meta")
    train_only(model, run.train_only)
    assert all(isinstance(layer.attention, Seer | SeerR) for layer in run.model.layers)
    assert learning(model) and all(".attention.pattern.gate." in name for name in learning(model))
    assert sum(p.numel() for p in learning(model).values()) == sum(
        layer.attention.cost(run.model.width, layer.projections, At(1)).params for layer in run.model.layers
    )


def test_twins_begin_with_the_twin_of_the_dense_recipe():
    """Same names and shapes but for the gates, so that its weights fit."""
    dense = recipes.get("llama-3-8b").twin()
    shapes = {name: p.shape for name, p in dense.model.build(device="meta").named_parameters()}
    for name in ("seer-attention", "seer-attention-r"):
        run = recipes.get(name).twin()
        assert run.init_from == f"runs/{dense.name}" and run.data.replace(seq_len=dense.data.seq_len) == dense.data
        own = {name: p.shape for name, p in run.model.build(device="meta").named_parameters() if ".gate." not in name}
        own |= {n: p.shape for n, p in run.model.build(device="meta").named_parameters() if "feed_forward" in n}
        assert own == shapes
