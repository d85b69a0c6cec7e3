"""From what a person names to a run: which setting wins, where each comes from, who is blamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sextant import recipes
from sextant.axes.attention import Full
from sextant.cli.runs import ENVIRONMENT, config_lines, resolve
from sextant.train.run import Run


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A run file as people write them: some defaults spelled out, most things left alone."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "name: mine\nsteps: 9\nclip: 1.0\nbatch: {rows: 8}\ndata: {seq_len: 32, vocab: 300}\n"
        "model:\n  name: m\n  vocab: 300\n  width: 16\n  context: 32\n  layers:\n  - &a\n"
        "    kv: {kind: gqa, heads: 2, kv_heads: 1, head_dim: 8, position: {kind: rope}}\n"
        "    feed_forward: {kind: dense, hidden: 8}\n  - {<<: *a, attention: {kind: window, window: 4}}\n"
    )
    return str(path)


def test_every_origin_is_the_true_one(file: str, monkeypatch: pytest.MonkeyPatch):
    """Also where the value equals the default, or what the layer below says."""
    monkeypatch.setenv(ENVIRONMENT, "steps=9; keep=2")
    settings = ["keep=2", "model.layers[*].kv.bias=false", "model.init={kind: normal}"]
    settings += ["model.layers[0].kv.position.kind=nope"]
    _, origins = resolve(file, "twin", settings, {"--seed": ("seed", 0), "--lr": ("optimiser.lr", None)})
    want = {
        file: ["name", "clip", "batch.rows", "model.width", "model.layers[1].kv.heads",
               "model.layers[1].attention.window"],
        "default": ["model.tied", "model.layers[1].kv.position.base", "batch.micro_rows", "optimiser.lr", "prompt",
                    "model.init.std", "model.layers[0].attention.kind", "init_from", "schedule.kind"],
        "env SEXTANT_SET": ["steps"],
        "--seed": ["seed"],
        "--set": ["keep", "model.layers[0].kv.bias", "model.layers[1].kv.bias", "model.init.kind",
                  "model.layers[0].kv.position.kind"],
    }  # fmt: skip
    assert {source: [path for path in paths if origins[path] != source] for source, paths in want.items()} == {
        source: [] for source in want
    }


def test_origins_of_a_recipe_and_a_schedule():
    run, origins = resolve("nano", "twin", ["model.schedule=3*full+window64", "steps=300"])
    assert origins["steps"] == "--set" and origins["optimiser.lr"] == "recipe nano" and origins["clip"] == "default"
    assert run.model.layers[0].attention == Full() and origins["model.layers[0].attention.kind"] == "--set"
    assert set(origins) == set(run.leaves())


def test_a_new_kind_has_its_own_defaults():
    _, origins = resolve("nano", "twin", ["optimiser.kind=muon"])
    assert origins["optimiser.kind"] == "--set" and origins["optimiser.lr"] == "recipe nano"
    assert origins["optimiser.momentum"] == origins["optimiser.adamw.lr"] == "default"


@pytest.mark.parametrize("name", ["nano", "mai-base-1", "deepseek-v3"])
def test_what_is_printed_can_be_given_back(name: str):
    settings = ["prompt='  # a: \"b\"'", "clip=null", "name=1e5"]
    run, origins = resolve(name, "twin", settings)
    lines = [line.rpartition("    # ")[0] for line in config_lines(run, origins)]
    assert "clip=null" in lines and run.prompt == '  # a: "b"'
    assert resolve(name, "twin", lines)[0] == run


def test_print_config_ends_each_line_with_the_origin(sextant: Any):
    code, out, _ = sextant("train", "nano", "--print-config", "--steps", "5", "--set", "prompt=2001")
    assert code == 0 and "steps=5    # --steps\n" in out and "prompt='2001'    # --set\n" in out
    assert "optimiser.betas=[0.9, 0.95]    # default\n" in out and "name=nano    # recipe nano\n" in out


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--steps", "ten"], "", 'error: wrong value: --steps steps (got "ten", expected a whole number)'),
        (["--data", " "], "", "--data data.source"),
        ([], "steps=abc", 'env SEXTANT_SET steps (got "abc"'),
        ([], "steps", "env SEXTANT_SET needs path=value"),
        (["--set", "steps=1", "--batch-size", "3"], "", "--batch-size batch"),
        (["--set", "optimiser.betas=[0.9, 1.5]"], "", "optimiser.betas[1] (got 1.5, expected less than 1"),
        (["--set", "optimiser.betas=[-0.1, 0.9]"], "", "optimiser.betas[0] (got -0.1, expected at least 0"),
        (["--set", "batch.ramp=[[5, 0]]"], "", "batch.ramp[0][1] (got 0, expected at least 1"),
        (["--set", "batch.ramp=[[5, -4]]"], "", "batch.ramp[0][1] (got -4, expected at least 1"),
        (["--set", f"seed={2**63}"], "", "--set seed"),
        (["--seed", "-1"], "", "--seed seed (got -1, expected at least 0)"),
        (["--set", "name=../../evil"], "", "a name is the name of a folder"),
        (["--set", "name=.."], "", "a name is the name of a folder"),
        (["--set", "name="], "", "a name is the name of a folder"),
        (["--set", "model.vocab=300"], "", "model.vocab (got 300, expected at least the tokenizer's 1024)"),
        (["--set", "data.vocab=2000"], "", "model.vocab (got 1024, expected at least the tokenizer's 2000)"),
        (["--dtype", "fp17"], "", "unknown kind: --dtype numerics.kind (got fp17). Known: bf16, fp32"),
        (["--set", "lr=1e-3"], "", "no such setting: --set lr (got lr). Did you mean 'optimiser.lr'?"),
        (["--set", "width=128"], "", "Did you mean 'model.width'?"),
    ],
)
def test_a_declaration_fails_before_anything_is_built(
    sextant: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], environment: str, words: str
):
    monkeypatch.setenv(ENVIRONMENT, environment)
    code, out, err = sextant("train", "nano", "--dry-run", *arguments)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1 and len(err) <= 200


def test_flags_give_text_as_typed():
    assert resolve("nano", "twin", [], {"--data": ("data.source", 2024)})[0].data.source == "2024"


def test_any_seed_that_fits_is_taken():
    run = recipes.get("nano").twin()
    assert Run.parse(run.replace(seed=2**63 - 1).to_dict()).seed == 2**63 - 1
