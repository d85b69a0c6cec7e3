"""Run folders: one process at a time, refused early when unusable, logs without torn or double lines."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sextant.core.errors import EnvironmentFault
from sextant.train import folder
from sextant.train.folder import RunFolder, environment

HOLD = (
    "import sys, time\nfrom sextant.train.folder import RunFolder\n"
    "run = RunFolder(sys.argv[1])\nprint('open', flush=True)\ntime.sleep(60)\n"
)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_new_folder_has_its_parts(tmp_path):
    with RunFolder(tmp_path / "runs" / "a") as run:
        run.write_config("steps: 3\n")
        run.write_tokenizer("{}")
        run.write_command(["sextant", "train", "twin", "--out", "a b"])
        run.record({"step": 1, "loss": 2.5})
        run.event("save", step=1)
        run.sample(1, "Once")
        assert run.config() == {"steps": 3}
    found = {str(path.relative_to(run.path)) for path in run.path.rglob("*")}
    assert found == {
        *("config.yaml", "tokenizer.json", "command.txt", "env.json", "metrics.jsonl", "events.jsonl", "lock"),
        *("samples", "samples/step-00000001.txt", "plots", "logs", "checkpoints"),
    }
    assert (run.path / "command.txt").read_text() == "sextant train twin --out 'a b'\n"
    assert lines(run.path / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]
    assert lines(run.path / "events.jsonl")[0]["event"] == "save"


def test_a_new_folder_has_no_config(tmp_path):
    with RunFolder(tmp_path / "a") as run:
        assert run.config() is None


def test_environment_says_what_the_bits_depend_on():
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["device"] == "cpu"
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40}", found["commit"])
    json.dumps(found)


def test_a_second_process_is_told_who_is_in(tmp_path):
    """A17, from another process; the lock ends with the process, even by SIGKILL."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "open\n"
    with pytest.raises(EnvironmentFault) as caught:
        RunFolder(tmp_path / "a")
    assert re.search(rf"run folder is in use by pid {holder.pid} on host \S+ since \d{{4}}-", str(caught.value))
    assert caught.value.exit_code == 6
    holder.kill()
    holder.wait()
    with RunFolder(tmp_path / "a") as run:
        assert [note for note in run.notes if f"took over the run folder from pid {holder.pid}" in note]


def test_a_closed_folder_opens_again_without_notes(tmp_path):
    RunFolder(tmp_path / "a").close()
    with RunFolder(tmp_path / "a") as run:
        assert run.notes == []


@pytest.mark.parametrize("name", ["", "checkpoints", "samples", "logs"])
def test_a_file_in_the_way_is_named(tmp_path, name):
    """A18."""
    path = tmp_path / "a"
    path.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
    path.joinpath(name).write_text("here")
    with pytest.raises(EnvironmentFault, match=re.escape(f"a file is in the way creating {path / name}")) as caught:
        RunFolder(path)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("name", ["lock", "env.json"])
def test_a_folder_in_the_way_of_a_file_is_refused_and_leaves_no_lock(tmp_path, name):
    (tmp_path / "a" / name).mkdir(parents=True)
    with pytest.raises(EnvironmentFault, match="a folder is in the way"):
        RunFolder(tmp_path / "a")
    (tmp_path / "a" / name).rmdir()
    RunFolder(tmp_path / "a").close()


def test_a_read_only_folder_is_refused_before_the_first_step():
    """A18: as an ordinary user, because nothing is read-only for root."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        path = Path(place) / "a"
        RunFolder(path).close()
        for held in (path, *path.iterdir()):
            os.chmod(held, 0o555 if held.is_dir() else 0o444)
        reader, writer = os.pipe()
        if os.fork() == 0:
            _open_as_ordinary_user(path, writer)
        os.close(writer)
        with os.fdopen(reader) as said:
            text = said.read()
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 6, text
        assert text.startswith(f"no permission opening run folder {path}")
        os.chmod(path, 0o755)


def _open_as_ordinary_user(path, writer):
    code = 1
    try:
        if os.getuid() == 0:
            os.setuid(65534)
        RunFolder(path)
    except EnvironmentFault as error:
        os.write(writer, str(error).encode())
        code = error.exit_code
    finally:
        os._exit(code)


def test_resume_leaves_one_line_a_step(tmp_path):
    with RunFolder(tmp_path / "a") as run:
        for step in range(1, 8):
            run.record({"step": step, "loss": 1 / step})
        assert run.truncate_metrics(5) == 2
        assert run.truncate_metrics(5) == 0
        for step in range(6, 9):
            run.record({"step": step, "loss": 1 / step})
    assert [line["step"] for line in lines(run.path / "metrics.jsonl")] == list(range(1, 9))


def test_an_unfinished_line_is_cut_on_opening(tmp_path):
    with RunFolder(tmp_path / "a") as run:
        run.record({"step": 1})
        run.event("start")
    for name in ("metrics.jsonl", "events.jsonl"):
        with (run.path / name).open("a") as file:
            file.write('{"step": 2, "lo')
    (run.path / ".tmp-config.yaml-77").write_text("half")
    with RunFolder(tmp_path / "a") as run:
        assert len(run.notes) == 2
        run.record({"step": 2})
    assert lines(run.path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
    assert len(lines(run.path / "events.jsonl")) == 1
    assert not list(run.path.glob(".tmp-*"))


def test_a_clock_that_jumps_back_changes_no_order(tmp_path, monkeypatch):
    """A16: times are for people."""
    times = iter(["2031-01-01T00:00:00+00:00", "1999-01-01T00:00:00+00:00", "2026-01-01T00:00:00+00:00"])
    with RunFolder(tmp_path / "a") as run:
        monkeypatch.setattr(folder, "_now", lambda: next(times))
        for step in (1, 2, 3):
            run.event("save", step=step)
            run.record({"step": step})
        run.truncate_metrics(2)
    assert [event["step"] for event in lines(run.path / "events.jsonl")] == [1, 2, 3]
    assert [line["step"] for line in lines(run.path / "metrics.jsonl")] == [1, 2]


def test_numbers_that_json_lacks_become_null(tmp_path):
    with RunFolder(tmp_path / "a") as run:
        run.record({"step": 1, "loss": float("nan"), "load": {"0": (float("inf"), 2)}})
    assert lines(run.path / "metrics.jsonl") == [{"step": 1, "loss": None, "load": {"0": [None, 2]}}]


def test_the_batch_that_broke_a_step_is_kept(tmp_path):
    tokens_T = torch.randint(0, 100, (64,))
    with RunFolder(tmp_path / "a") as run:
        path = run.keep_batch(7, {"tokens_T": tokens_T})
    assert path.name == "bad-batch-7.safetensors"
    assert torch.equal(load_file(path)["tokens_T"], tokens_T)
