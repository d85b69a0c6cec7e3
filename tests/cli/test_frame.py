"""What the command line promises whatever the verb: lazy imports, one-line errors, exit codes, quiet pipes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from sextant.cli import VERBS, frame
from sextant.core.errors import CheckpointError, Stopped
from sextant.train.folder import RunFolder

COMMAND = [sys.executable, "-m", "sextant"]


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, **options)


def test_help_names_every_verb_and_imports_no_torch():
    program = (
        "import sys; from sextant.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: code = stop.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout and line.split(":")[0] in done.stdout for verb, line in VERBS.items())


def test_importing_sextant_is_light():
    program = "import sys, sextant; sys.exit(len({'torch', 'pydantic', 'typer'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(sextant: Any, verb: str):
    code, out, err = sextant(verb, "--help")
    assert code == 0 and "Usage" in out and not err


def test_version(sextant: Any):
    assert sextant("--version") == (0, "sextant 0.1.0\n", "")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "error: no such verb (got 'trian'). Did you mean 'train'?\n"),
        (["show", "nano", "--jsno"], "error: no such option (got --jsno). Did you mean '--json'?\n"),
        (["train"], "error: missing argument 'RECIPE_OR_RUN'. See 'sextant train --help'\n"),
        (["generate", "x", "--temperature", "hot"], "error: invalid value for '--temperature': "),
        (["show", "mai-base"], "error: no such recipe (got mai-base). Did you mean 'mai-base-1'?\n"),
        (["show", "nano", "--set", "model.widht=3"],
         "error: no such setting: --set model.widht (got widht). Did you mean 'width'?\n"),
    ],
)
def test_misuse_is_one_line_and_exit_2(sextant: Any, arguments: list[str], line: str):
    code, out, err = sextant(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(line) and err.count("\n") == 1 and len(err) <= 200


def test_no_verb_shows_help_and_exit_2(sextant: Any):
    code, out, err = sextant()
    assert code == 2 and "Verbs:" in out and not err


def verb(body: Any) -> Any:
    app = typer.Typer()
    app.command()(body)
    return get_command(app)


def test_known_errors_have_their_code_and_no_traceback(capsys: pytest.CaptureFixture[str]):
    def fail() -> None:
        raise CheckpointError("two\nlines", where="step 3")

    assert frame.run(verb(fail), [], debug=False) == 4
    assert capsys.readouterr().err == "error: two lines: step 3\n"
    assert frame.run(verb(fail), [], debug=True) == 4
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_leaves_a_crash_file_and_exit_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail() -> None:
        raise ZeroDivisionError("by nothing")

    assert frame.run(verb(fail), [], debug=False) == 1
    err = capsys.readouterr().err
    files = list(tmp_path.glob("sextant-crash-*.txt"))
    assert len(files) == 1 and str(files[0]) in err and err.count("\n") == 1
    assert "ZeroDivisionError: by nothing" in files[0].read_text()


def test_a_bug_in_a_run_leaves_its_crash_file_there(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    def fail() -> None:
        with RunFolder(tmp_path / "run"):
            raise ZeroDivisionError("by nothing")

    assert frame.run(verb(fail), [], debug=False) == 1
    assert len(list((tmp_path / "run" / "logs").glob("sextant-crash-*.txt"))) == 1


def test_a_stop_after_saving_is_no_error(capsys: pytest.CaptureFixture[str]):
    def stop() -> None:
        raise Stopped("stopped after step 3, saved")

    assert frame.run(verb(stop), [], debug=False) == 75
    assert capsys.readouterr().err == "stopped after step 3, saved\n"


@pytest.mark.parametrize(
    ("bytes_asked", "got"), [(2**50, "a request for 1125899906842624 bytes"), (2**62 * 4, "Storage size calculation")]
)
def test_no_memory_on_a_cpu_is_a_fault_of_the_machine(
    capsys: pytest.CaptureFixture[str], bytes_asked: int, got: str
):
    import torch

    assert frame.run(verb(lambda: torch.empty(bytes_asked // 4)), [], debug=False) == 6
    err = capsys.readouterr().err
    assert err.startswith(f"error: out of memory (got {got}") and err.count("\n") == 1 and len(err) <= 200


def test_what_the_machine_refuses_anywhere_is_a_fault_of_it(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert frame.run(verb(lambda: os.stat(tmp_path / ("x" * 300))), [], debug=False) == 6
    err = capsys.readouterr().err
    assert err.startswith("error: file name too long: xxx") and err.count("\n") == 1 and len(err) <= 200


@pytest.mark.parametrize(("error", "code"), [(MemoryError(), 6), (KeyboardInterrupt(), 130)])
def test_memory_and_interrupts(error: BaseException, code: int):
    def fail() -> None:
        raise error

    assert frame.run(verb(fail), [], debug=False) == code


def test_the_process_exits_with_the_code(tmp_path: Path):
    done = run("generate", str(tmp_path / "nothing"), "--prompt", "x")
    assert done.returncode == 4 and done.stdout == ""
    assert done.stderr.startswith("error: no such checkpoint: ") and done.stderr.count("\n") == 1


def test_debug_is_taken_anywhere_and_from_the_environment():
    assert "Traceback" in run("show", "nope", "--debug").stderr
    quiet = run("show", "nope", env={**os.environ, "SEXTANT_DEBUG": "0"})
    assert quiet.returncode == 2 and "Traceback" not in quiet.stderr


def test_a_closed_pipe_is_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*COMMAND, "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert done.returncode == frame.CLOSED_PIPE and done.stderr == ""


def test_ctrl_c_ends_with_130_and_no_traceback(trained: Path):
    chat = subprocess.Popen(
        [*COMMAND, "generate", str(trained), "--prompt", "x", "--max-tokens", "100k", "--n", "64"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    time.sleep(0.2)
    while chat.poll() is None and not _imported(chat.pid):
        time.sleep(0.1)
    chat.send_signal(signal.SIGINT)
    out, err = chat.communicate(timeout=60)
    assert chat.returncode == 130 and (out, err) == ("", "")


def _imported(pid: int) -> bool:
    return "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text()


def test_a_pipe_gets_no_escape_codes():
    plain = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    assert "\x1b" not in run("list", "norms", env=plain).stdout
