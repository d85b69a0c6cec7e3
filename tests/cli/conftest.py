"""A trained run folder, made once through the command line itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.main import get_command

from sextant.cli import app, frame

Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sextant(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """``sextant("show", "nano")`` gives exit code, stdout and stderr, inside this process."""
    monkeypatch.setenv("NO_COLOR", "1")

    def invoke(*arguments: str, debug: bool = False) -> tuple[int, str, str]:
        code = frame.run(get_command(app), list(arguments), debug)
        said = capsys.readouterr()
        return code, said.out, said.err

    return invoke


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``nano`` after two steps."""
    folder = tmp_path_factory.mktemp("runs") / "nano"
    settings = ["steps=2", "schedule.warmup=0", "eval_tokens=256", "data.seq_len=32", "save_every=1", "sample_every=9"]
    arguments = [word for setting in settings for word in ("--set", setting)]
    code = frame.run(get_command(app), ["train", "nano", "-o", str(folder), "-q", "--device", "cpu", *arguments], False)
    assert code == 0
    return folder
