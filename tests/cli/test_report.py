"""``sextant report``: a run folder and a recipe, as a table, as JSON, as files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

SHORT = ["--tokens", "256", "--set", "data.seq_len=64", "--set", "model.vocab=1024", "--set", "data.vocab=1024"]
SPARSE = ["--set", "model.layers[0].attention={kind: moba, block: 8, top_k: 3}"]


def test_a_recipe_is_looked_at_before_training(sextant: Any, tmp_path: Path):
    code, out, err = sextant("report", "nano", "-o", str(tmp_path), *SHORT, *SPARSE)
    assert code == 0, err
    lines = out.splitlines()
    assert max(map(len, lines[:-1])) <= 80 and "fresh weights" in lines[0]
    table = [line.split() for line in lines if line.strip()[:1].isdigit()]
    assert [row[1] for row in table[:4]] == ["moba", "window", "window", "full"]
    assert all(value != "-" for value in table[0]) and table[1][2:9] == 7 * ["-"]
    assert (tmp_path / "layers.csv").exists() and (tmp_path / "choices.csv").exists()


def test_json_holds_every_number_and_names_the_files(sextant: Any, tmp_path: Path):
    code, out, _ = sextant("report", "mai-base-1", "--json", "-o", str(tmp_path), "--tokens", "128", *SPARSE)
    facts = json.loads(out)
    assert code == 0 and facts["source"] == "fresh weights" and facts["scored"] == 10
    layers = facts["layers"]
    assert layers[0]["recall"] <= 1 and layers[0]["union"] >= layers[0]["read"] and "recall" not in layers[1]
    assert set(facts["experts"]) == {"1", "3", "5"} and len(facts["experts"]["1"]["copies"]) == 16
    assert all(Path(path).exists() for path in facts["files"])
    assert "NaN" not in out  # attention starts switched off here, so no gradient reaches the prompt
    assert layers[0]["gradient"] is None


def test_a_trained_run_reports_into_its_folder(sextant: Any, trained: Path, tmp_path: Path):
    folder = shutil.copytree(trained, tmp_path / "run")
    code, out, err = sextant("report", str(folder), "--tokens", "64")
    assert code == 0 and "(trained)" in out, err
    assert (folder / "report" / "layers.csv").exists() and not (folder / "report" / "load.csv").exists()


def test_a_trained_run_cannot_be_set_and_a_wrong_name_is_told(sextant: Any, trained: Path):
    code, _, err = sextant("report", str(trained), "--set", "steps=3")
    assert code == 2 and "a trained run cannot be set" in err
    code, _, err = sextant("report", "nanoo")
    assert code == 2 and "Did you mean 'nano'?" in err


def test_show_tells_what_attention_adds(sextant: Any):
    """L4: MoBA adds nothing, its key-conv does."""
    assert "extra_params  0 on top" in sextant("show", "moba-llama-8b", "--at", "8k")[1]
    setting = "model.layers[0].attention.key_conv=3"
    facts = json.loads(sextant("show", "moba-llama-8b", "--size", "twin", "--set", setting, "--json")[1])
    assert facts["extra_params"] == 2 * 32 * 3
