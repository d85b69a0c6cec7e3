"""The experiments on mixtures run: one cell of two steps each, and their tables and pictures from such cells."""

from __future__ import annotations

import importlib.util
import math
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sextant.axes.capacity.experts import ExpertsModule
from sextant.core.stream import Stream
from sextant.data.loader import heldout
from sextant.lab import trained

LAB = Path(__file__).resolve().parents[2] / "docs" / "lab"
ONE = {"zero_gain_load": "gain 0", "drops": "free capacity", "balance": "global batch usual", "fp8_quality": "fp32"}


def script(name: str) -> ModuleType:
    """The experiment, with models of two layers."""
    found = importlib.util.spec_from_file_location(name, LAB / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    module.mixture = lambda experts, **sizes: trained.mixture(experts, **{**sizes, "layers": 2})
    return module


@pytest.fixture
def short(monkeypatch):
    """A held-out split of two batches."""
    for module in ("sextant.train.loop", "sextant.lab.trained"):
        monkeypatch.setattr(f"{module}.heldout", lambda *args: islice(heldout(*args), 2))


def report(lab: ModuleType, name: str, cells: dict) -> str:
    if name == "zero_gain_load":
        return lab.by_step(cells)
    return trained.table(cells, {"loss": ".4f", "max_vio": ".2f"}, "none") if name == "balance" else lab.report(cells)


@pytest.mark.parametrize("name", ONE)
def test_one_cell_and_the_report_of_a_grid_of_it(name, short, tmp_path):
    pytest.importorskip("matplotlib")
    lab = script(name)
    cell = lab.cell(ONE[name], 0, 2)
    assert math.isfinite(cell["loss"]) and [point[0] for point in cell["curve"]] == [2]
    cells = {(arm, seed): {**cell, "loss": cell["loss"] + seed} for arm in lab.ARMS for seed in range(2)}
    text = report(lab, name, cells)
    lab.draw(tmp_path / "a.png", cells)
    assert all(f"| {arm} " in text for arm in lab.ARMS)
    assert name not in ("balance", "fp8_quality") or "+0.0000 ± 0.0000" in text
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    rows = (tmp_path / "a.csv").read_text().splitlines()
    assert all(any(row.startswith(f"{arm},1,") for row in rows) for arm in lab.ARMS)
    if name == "fp8_quality":
        router, residual = cell["after"]["router fp8"], cell["after"]["residual fp8"]
        assert cell["changed"] == 0 and router[1] > 0.01 and residual[1] > cell["after"]["residual bf16"][1]


def test_learning_by_heart_and_its_picture(tmp_path):
    pytest.importorskip("matplotlib")
    lab = script("fp8_by_heart")
    lab.BATCHES, lab.ROWS = 2, 2
    cells = {arm: lab.cell(arm, 0, 2) for arm in ("books bf16", "random bf16", "random delayed")}
    assert len({cell["loss"] for cell in cells.values()}) == 3
    assert [at for at, _ in cells["books bf16"]["curve"]] == [2]
    lab.draw(tmp_path / "a.png", {(arm, seed): cells["books bf16"] for arm in lab.ARMS for seed in range(2)})
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1 + 2 * len(lab.ARMS)


@pytest.mark.parametrize("arm", ["fp8 delayed", "fp8 blocks", "router fp8", "residual bf16", "logits bf16"])
def test_every_kind_of_lowering_trains(arm, short):
    lab = script("fp8_quality")
    cell = lab.cell(arm, 0, 1)
    assert math.isfinite(cell["loss"]) and (cell["changed"] > 0) == (arm != "logits bf16")
    assert cell["loss"] != cell["exact"]


def test_rounding_is_that_of_the_format_and_lets_gradients_pass():
    lab = script("fp8_quality")
    x = (100 * torch.randn(1000, generator=torch.Generator().manual_seed(0))).requires_grad_()
    for dtype in lab.DTYPES.values():
        y = lab.rounded(x, dtype)
        most = torch.finfo(dtype).max
        assert torch.equal(y, x.clamp(-most, most).to(dtype).float())
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones(1000))
    assert lab.rounded(torch.tensor(1e4), lab.DTYPES["fp8"]) == 448


def test_lowering_ends_with_its_context():
    lab = script("fp8_quality")
    model = lab.run(lab.FP32(), 1).model.build(seed=0)
    tokens_T, stream = torch.arange(40), Stream.of_lengths([40])
    before = model(tokens_T, stream).hidden_TD
    for name, lower in lab.LOWERED.items():
        with lower(model):
            inside = model(tokens_T, stream).hidden_TD
        assert torch.equal(model(tokens_T, stream).hidden_TD, before)
        assert torch.equal(inside, before) == name.startswith("logits")


def test_rule_of_training_drops_in_evaluation_too():
    lab = script("drops")
    model = lab.run("free capacity", 1).model.build(seed=0).eval()
    tokens_T, stream = torch.zeros(64, dtype=torch.long), Stream.of_lengths([64])
    with lab.as_trained(model):
        kept = model(tokens_T, stream).routings[0].kept_TA
    assert kept is not None and int(kept.sum()) == 2 * 8  # all to two experts with 64 * 2 / 16 places each
    assert model(tokens_T, stream).routings[0].kept_TA is None
    assert all(layer.spec.overflow.eval_factor is None for layer in model.modules() if isinstance(layer, ExpertsModule))


def test_a_flip_is_named_by_half_of_the_seeds_and_judged_by_the_others():
    """Free is best dropless and worst with drops; nothing else changes places."""
    lab = script("drops")
    rank = {name: place for place, name in enumerate(lab.VARIANTS)}
    cells = {}
    for arm in lab.ARMS:
        variant, rule = arm.split()
        for seed in range(4):
            loss = (9 if (variant, rule) == ("free", "capacity") else rank[variant]) + 0.01 * seed * rank[variant]
            cells[arm, seed] = {"ruled": loss, "loss": loss, "drop_rate": 0.5, "max_vio": 1.0}
    assert {first for first, _ in lab.flips(cells, [0, 1])} == {"free"}
    assert len(lab.flips(cells, [0, 1])) == len(lab.VARIANTS) - 1
    rows = lab.report(cells).splitlines()
    assert "| free, quiet | 0 1 | -1.0050 ± 0.0050 | +7.9950 ± 0.0050 |" in rows
    assert "| free | +9.0000 ± 0.0000 |" in rows and "| wide | +0.0000 ± 0.0000 |" in rows
    assert "| free, quiet | 2 3 | -1.0250 ± 0.0050 | +7.9750 ± 0.0050 |" in rows
    two = {(arm, seed): cell for (arm, seed), cell in cells.items() if arm.split()[0] in ("free", "quiet")}
    assert lab.variants({key: cell for key, cell in two.items() if key[0] != "quiet capacity"}) == ["free"]
    assert lab.report(two).splitlines()[-1] == "| free, quiet | 0 1 2 3 | -1.0150 ± 0.0065 | +7.9850 ± 0.0065 |"


def test_paired_differences_and_their_standard_errors():
    cells = {("a", 0): {"loss": 1.0}, ("a", 1): {"loss": 2.0}, ("b", 0): {"loss": 0.5}, ("b", 1): {"loss": 1.9}}
    mean, error = trained.paired(cells, "a", "b")
    assert mean == pytest.approx(0.3) and error == pytest.approx(0.2)
    assert trained.table(cells, {"loss": ".2f"}, "b").splitlines()[2] == "| a | 1.50 | +0.3000 ± 0.2000 |"
    assert math.isnan(trained.mean_and_error([1.0])[1])
