"""The run folder: one place for everything that one training run writes, used by one process at a time."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import socket
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy
import torch
from torch import Tensor

import sextant
from sextant.core import fs, tensorfile
from sextant.core.errors import EnvironmentFault
from sextant.core.spec import read_yaml

_FOLDERS = ("samples", "plots", "logs", "checkpoints")
_LOGS = ("metrics.jsonl", "events.jsonl")


class RunFolder:
    """``runs/NAME`` with ``config.yaml``, ``command.txt``, ``env.json``, ``metrics.jsonl``, ``events.jsonl`` and
    the folders ``samples``, ``plots``, ``logs`` and ``checkpoints``.

    Opening it takes the folder's lock and proves that it can be written, before any training happens. Times in it are
    for people; order comes from step numbers, so a clock that jumps changes nothing.

    Attributes:
        path: the folder.
        notes: lines worth printing, such as a lock left by a process that died.

    Raises:
        EnvironmentFault: in use by another process, read-only, or a file is in the way.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.notes: list[str] = []
        for name in ("", *_FOLDERS):
            fs.make_folder(self.path / name)
        self._lock = fs.Lock(self.path / "lock")
        self._take_lock()
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    @property
    def checkpoints(self) -> Path:
        """Root for the functions of :mod:`sextant.train.checkpoint`."""
        return self.path / "checkpoints"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            setattr(error, "logs", self.path / "logs")  # noqa: B010 - where its traceback belongs, if it is a bug
        self.close()

    def close(self) -> None:
        """Give the folder back."""
        self._lock.release()

    def write_config(self, text: str) -> None:
        """``config.yaml``: the whole declaration of the run."""
        fs.write_text(self.path / "config.yaml", text)

    def config(self) -> Any:
        """Plain data of ``config.yaml``; None in a new folder."""
        path = self.path / "config.yaml"
        return read_yaml(path) if path.exists() else None

    @property
    def trained(self) -> bool:
        """Whether a step was taken here, saved or not."""
        return bool(records(self.path / "metrics.jsonl"))

    def write_environment(self, device: torch.device | str) -> None:
        """``env.json``: what the bits of this start depend on besides the declaration."""
        fs.write_json(self.path / "env.json", environment(device))

    def write_tokenizer(self, text: str) -> None:
        """``tokenizer.json``: what the checkpoints' token ids mean."""
        fs.write_text(self.path / "tokenizer.json", text)

    def write_command(self, arguments: Sequence[str]) -> None:
        """Add the command to ``command.txt``, one line for each start, ready to be pasted into a shell."""
        fs.append_line(self.path / "command.txt", shlex.join(arguments))

    def record(self, metrics: Mapping[str, Any]) -> None:
        """One line in ``metrics.jsonl``; ``metrics["step"]`` orders it. Numbers that are not finite become null."""
        fs.append_line(self.path / "metrics.jsonl", _line(metrics))

    def event(self, kind: str, **fields: Any) -> None:
        """One line in ``events.jsonl``: a start, a save, a skipped step, a warning."""
        fs.append_line(self.path / "events.jsonl", _line({"event": kind, **fields, "time": _now()}))

    def sample(self, step: int, text: str) -> Path:
        """Text that the model wrote after ``step``, as ``samples/step-XXXXXXXX.txt``."""
        path = self.path / "samples" / f"step-{step:08d}.txt"
        fs.write_text(path, text)
        return path

    def keep_batch(self, step: int, tensors: Mapping[str, Tensor]) -> Path:
        """The batch that broke ``step``, as ``logs/bad-batch-STEP.safetensors``, to be looked at later."""
        path = self.path / "logs" / f"bad-batch-{step}.safetensors"
        fs.write_bytes(path, b"".join(tensorfile.chunks(tensors)))
        return path

    def truncate_metrics(self, step: int) -> int:
        """Drop the metrics after ``step``, which a resumed run will write again; returns how many lines went."""
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        if len(kept) < len(lines):
            fs.write_bytes(path, b"".join(line + b"\n" for line in kept))
        return len(lines) - len(kept)

    def _take_lock(self) -> None:
        with fs.guard(f"opening run folder {self.path}", self.path):
            try:
                before = self._lock.take(f"pid {os.getpid()} on host {socket.gethostname()} since {_now()}")
            except BlockingIOError:
                raise EnvironmentFault(
                    f"run folder is in use by {self._lock.holder() or 'a process that is starting'}",
                    where=self._lock.path,
                    fix="Wait for it, stop it, or give another --out",
                ) from None
        if before:
            self.notes.append(f"took over the run folder from {before}, which is gone")

    def _prepare(self) -> None:
        for leftover in sorted(self.path.glob(".tmp-*")):
            fs.remove_tree_safely(leftover)
        for name in _LOGS:
            self._mend(self.path / name)
        self.write_environment("cpu")  # until the run says where it trains

    def _mend(self, path: Path) -> None:
        """Cut the unfinished last line that a killed process left, so that the next line starts on its own."""
        with fs.guard(f"reading {path}", self.path):
            data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            fs.write_bytes(path, whole)
            self.notes.append(f"cut an unfinished line from {path.name}")


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What the bits of a run depend on besides its declaration: versions, machine, threads, commit, device."""
    return {
        "sextant": sextant.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": _device(torch.device(device)),
    }


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    """The commit of a source checkout; None for an installed package."""
    source = Path(sextant.__file__).parents[1]
    if not (source / ".git").exists():
        return None
    command = ["git", "-C", str(source), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _line(fields: Mapping[str, Any]) -> str:
    return json.dumps({key: _finite(value) for key, value in fields.items()}, allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON has no NaN, and many readers refuse it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` or ``events.jsonl`` that are whole; damaged ones are passed over."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [record for record in map(_record, lines) if record]


def _record(line: bytes) -> dict[str, Any]:
    """A line's fields; none when it is no record with a step."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else {}


def _step_of(line: bytes) -> float:
    """The step of a metrics line; a line that is no record counts as later than every step."""
    return _record(line).get("step", math.inf)
