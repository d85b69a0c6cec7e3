"""Every recipe: the published counts, formula = built on the meta device, and a twin that trains."""

import pytest
import torch
import yaml

from sextant import recipes
from sextant.axes.attention import Full
from sextant.axes.stability import Role, roles
from sextant.core.cost import At
from sextant.core.errors import UsageError
from sextant.core.stream import Stream
from sextant.recipes import mai_base_1
from sextant.train.loss import Balance, micro_loss
from sextant.train.run import Run, check_run

PUBLISHED = {
    # name: (total, active) in billions, to the digits of the source; None where the source gives none
    "mai-base-1": (962.15, 34.66),  # MAI-Base-1, section 2.2
    "mixtral-8x7b": (46.70, 12.88),  # 2401.04088 prints 46.7 and 12.9
    "mistral-7b": (7.24, 7.24),  # 2310.06825
    "llama-3-8b": (8.03, 8.03),  # 2407.21783
    "deepseek-v2-lite": (15.71, 2.66),  # 2405.04434 prints 15.7 and 2.4, without the embedding 2.45
    "deepseek-v2": (235.74, 21.38),  # 2405.04434 prints 236 and 21
    "deepseek-v3": (671.03, 37.55),  # 2412.19437 prints 671 and 37
    "moba-llama-8b": (8.03, 8.03),  # 2502.13189: the same weights
    "dbrx": (131.60, 36.47),  # published as 132 and 36
    "deepseek-moe-16b": (16.38, 2.83),  # 2401.06066 prints 16.4 and 2.8
    "glam": (1161.76, 96.60),  # 2112.06905 prints 1.2 T and 96.6
}

GEMMA_NON_EMBEDDING = {
    # 2503.19786, table 1, millions
    "gemma-3-1b": 698,
    "gemma-3-4b": 3209,
    "gemma-3-12b": 10_759,
    "gemma-3-27b": 25_600,
}


def cost(run: Run):
    return run.model.cost(At(run.data.seq_len))


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name):
    total, active = PUBLISHED[name]
    counted = cost(recipes.get(name).paper())
    assert round(counted.params / 1e9, 2) == total
    assert round(counted.active_params / 1e9, 2) == active


def test_minimax_counts_are_exact():
    """2501.08313 prints 456 B and 45.9 B; the latter leaves out both embedding tables."""
    model = recipes.get("minimax-text-01").paper().model
    counted = model.cost(At(8192))
    assert counted.params == 456_089_655_296
    assert counted.active_params - 2 * model.vocab * model.width == 45_944_920_064
    assert counted.state_bytes == 70 * 4 * 2**20 + 8192 * 40_960
    assert [i for i, layer in enumerate(model.layers) if layer.attention.kind == "full"] == list(range(7, 80, 8))


@pytest.mark.parametrize("name", GEMMA_NON_EMBEDDING)
def test_gemma_without_embedding_is_the_published_count(name):
    model = recipes.get(name).paper().model
    rest = model.cost(At(1)).params - model.vocab * model.width
    assert round(rest / 1e6) == GEMMA_NON_EMBEDDING[name]


@pytest.mark.parametrize("name", recipes.names())
@pytest.mark.parametrize("size", ["paper", "twin"])
def test_formula_equals_the_meta_built_count(name, size):
    run = getattr(recipes.get(name), size)()
    model = run.model.build(run.numerics, device="meta")
    assert sum(p.numel() for p in model.parameters()) == run.model.training_cost(At(run.data.seq_len)).params


@pytest.mark.parametrize("name", recipes.names())
@pytest.mark.parametrize("size", ["paper", "twin"])
def test_a_run_survives_yaml_and_its_own_checks(name, size):
    run = getattr(recipes.get(name), size)()
    check_run(run)
    assert Run.parse(yaml.safe_load(run.to_yaml())) == run


SMALL = [name for name in recipes.names() if "-l" not in name and name not in ("dense-150m", "moe-400m-a100m")]


@pytest.mark.parametrize("name", SMALL)
def test_a_twin_learns_to_repeat_a_batch(name):
    """Twenty steps on one batch: the loss falls well below that of the first step."""
    run = recipes.get(name).twin()
    torch.manual_seed(0)
    model = run.model.build(run.numerics, seed=1)
    optimiser = run.optimiser.build(model)
    tokens_T = torch.randint(0, run.model.vocab, (128,))
    targets_T = tokens_T.roll(-1)
    balance, stream, losses = Balance(run.model), Stream.of_lengths([64, 64]), []
    for _ in range(20):
        balance.start()
        loss = micro_loss(model, tokens_T, targets_T, stream, balance, 128, 128)
        loss.total.backward()
        optimiser.step(1.0)
        losses.append(float(loss.nats) / 128)
    assert losses[-1] < losses[0] - 1.0


def test_every_ladder_rung_follows_the_rule():
    """MAI-Base-1, section 2.1: D = 256 L / 3, the last layer global and a mixture of experts."""
    for depth in range(12, 73, 6):
        model = recipes.get(f"mai-base-1-l{depth}").paper().model
        assert model.width == 256 * depth // 3 and len(model.layers) == depth
        assert model.layers[-1].attention.kind == "full" and model.layers[-1].kv.position.kind == "nope"
        assert model.layers[-1].feed_forward.kind == "latent_experts"
        assert sum(layer.attention.kind == "full" for layer in model.layers) == depth // 6


def test_the_ladder_has_whole_periods_only():
    """At 78 layers the rule gives another model than the printed one, so another name."""
    for rung in (mai_base_1.ladder, mai_base_1.twin_at):
        with pytest.raises(UsageError, match=r"no such rung: depth \(got 13, expected a multiple of 6\)"):
            rung(13)
    last, paper = mai_base_1.ladder(78), mai_base_1.paper()
    assert last.name == last.model.name == "mai-base-1-l78" and last.model.replace(name="mai-base-1") != paper.model
    assert paper.name == paper.model.name == "mai-base-1"


HEAD_ONLY = {"deepseek-v2-lite": 2.45, "deepseek-v2": 20.85, "deepseek-v3": 36.63}


@pytest.mark.parametrize("name", HEAD_ONLY)
def test_deepseek_counts_its_head_and_not_its_embedding(name):
    """2405.04434 prints 2.4 B for V2-Lite, and the release notes of V3 36.6 B (spec deepseek-v3 2.7)."""
    run = recipes.get(name).paper()
    assert round((cost(run).active_params - run.model.vocab * run.model.width) / 1e9, 2) == HEAD_ONLY[name]


def test_moba_adds_nothing():
    """2502.13189: 29 of 32 layers sparse, the dense model's parameters, and its weights load as they are."""
    recipe = recipes.get("moba-llama-8b")
    kinds = [layer.attention.kind for layer in recipe.paper().model.layers]
    assert kinds == 29 * ["moba"] + 3 * ["full"] and recipe.paper().model.context == 2**20
    assert cost(recipe.paper()).params == cost(recipes.get("llama-3-8b").paper()).params
    sparse = recipe.twin().model
    dense = sparse.replace(layers=tuple(layer.replace(attention=Full()) for layer in sparse.layers))
    report = sparse.build(seed=1).load_state_dict(dense.build(seed=2).state_dict())
    assert report.missing_keys == report.unexpected_keys == []


def test_every_parameter_has_one_role():
    run = recipes.get("mai-base-1").twin()
    model = run.model.build(device="meta")
    by_role = roles(model)
    assert set(by_role) == {name for name, _ in model.named_parameters()}
    assert by_role["blocks.1.feed_forward.router.weight"] is Role.ROUTER
    assert by_role["blocks.1.feed_forward.experts.up_EDF"] is Role.FF_IN
    assert by_role["blocks.0.attention.kv.q_norm.gain"] is Role.GAIN


def test_an_unknown_recipe_is_refused_with_the_nearest():
    with pytest.raises(recipes.UsageError, match="mixtral-8x7b"):
        recipes.get("mixtral-8x7")
