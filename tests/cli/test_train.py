"""``sextant train``: what a dry run checks, and that pictures never hide how a training ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sextant import recipes

SMALL = [word for setting in ("steps=2", "schedule.warmup=0", "eval_tokens=256", "data.seq_len=32")
         for word in ("--set", setting)]


def test_a_dry_run_writes_nothing(sextant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = sextant("train", "nano", "--dry-run")
    assert code == 0 and "FLOPs each" in out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--device", "gpu"], 2),
        (["--data", "no/such/folder"], 3),
        (["--set", "init_from=no/such/run"], 4),
        (["--set", "train_only=nomatch"], 2),
        (["--set", "model.vocab=300"], 2),
        (["--set", "data.epochs=1", "--steps", "1000000"], 3),
        (["--set", f"prompt={'long words ' * 500}"], 2),
    ],
)
def test_a_dry_run_checks_what_a_start_checks(sextant: Any, arguments: list[str], code: int):
    found, _, err = sextant("train", "nano", "--dry-run", *arguments)
    assert found == code and err.startswith("error: ") and err.count("\n") == 1


def test_the_demo_trains_writes_and_says_how_to_go_on(sextant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With the smallest recipe in the place of MAI-Base-1's twin."""
    nano = recipes.get("nano")
    monkeypatch.setattr("sextant.recipes.get", lambda name: nano)
    code, out, err = sextant("demo", "--steps", "2", "-o", str(tmp_path / "demo"))
    assert code == 0 and "step 2/2 100%" in err
    assert out.startswith("\nROMEO.\n") and "bits per byte" in out and f"sextant chat {tmp_path / 'demo'}" in out
    assert (tmp_path / "demo" / "plots" / "loss.png").exists()


def test_pictures_that_fail_leave_the_result_alone(sextant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(_: Path) -> None:
        raise ValueError("no fonts")

    monkeypatch.setattr("sextant.train.plots.draw", broken)
    code, out, err = sextant("train", "nano", "-o", str(tmp_path / "run"), "--device", "cpu", *SMALL)
    assert code == 0 and "bits per byte" in out and "warning: no plots: ValueError: no fonts" in err
