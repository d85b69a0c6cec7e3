"""Kill a process that saves, at every primitive step or at any time, and see what is left.

A warm parent forks the victim, so that a point costs milliseconds. The victim resumes, saves and retains as a training
run does, and reports each acknowledged step through a pipe; the parent then resumes in its place and compares.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from sextant.core import fs
from sextant.core.errors import CheckpointError
from sextant.train import checkpoint

SAVES = 2
IDENTITY = {"recipe": "kill-points", "threads": 1}
SYSCALLS = ("openat", "write", "fsync", "close", "rename", "mkdir", "unlink", "rmdir")

Arm = Callable[[], None]


def parts(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors that depend on the step alone, so that a mix of two steps is seen."""
    generator = torch.Generator().manual_seed(step)
    model = {f"layers.{i}.weight": torch.randn(24, 33, generator=generator) for i in range(3)}
    return {"model": model, "optimizer": {name: weight.square() for name, weight in model.items()}}


def cycle(root: Path, acknowledge: Callable[[int], None], saves: int = SAVES) -> None:
    """Resume, save some steps with retention, and save the last of them again."""
    found, _ = checkpoint.newest(root)
    first = found.step + 1 if found else 1
    for step in [*range(first, first + saves), first + saves - 1]:
        checkpoint.save(root, step, parts(step), {"cursor": step}, IDENTITY)
        acknowledge(step)
        checkpoint.retain(root, keep=2)


@dataclass(frozen=True)
class Outcome:
    """One point: where the process was when it died, and what became of its work."""

    at: str
    killed: bool
    acknowledged: int
    resumed: int
    leftovers: int
    faults: tuple[str, ...]


class Sweep:
    """Kills in one checkpoint folder, one after the other, as the crashes of one long run."""

    def __init__(self, root: Path):
        self.root = root
        self.acknowledged = 0
        self._settle()
        self.operations = self._record()
        began = time.perf_counter()
        self.crash(lambda: None)
        self.seconds = time.perf_counter() - began
        self._settle()

    def _settle(self) -> None:
        cycle(self.root, self._note)

    def _note(self, step: int) -> None:
        self.acknowledged = max(self.acknowledged, step)

    def _record(self) -> list[str]:
        """The primitive steps of one undisturbed cycle."""
        seen: list[str] = []
        fs.hooks.append(lambda operation, path: seen.append(operation))
        try:
            self._settle()
        finally:
            fs.hooks.pop()
        return seen

    def at_primitive(self, k: int) -> Outcome:
        """Die just before primitive step ``k`` (from 0) of a cycle."""
        killed = self.crash(lambda: fs.hooks.append(_killer(k)))
        return self.inspect(self.operations[k] if k < len(self.operations) else "end", killed)

    def at_time(self, seconds: float) -> Outcome:
        """Die after a time, wherever the process is: it saves without end."""
        return self.inspect("timer", self.crash(lambda: None, after=seconds))

    def twice(self, k: int, second: int) -> Outcome:
        """Die at step ``k``, then again at step ``second`` of the process that cleans up."""
        self.crash(lambda: fs.hooks.append(_killer(k)))
        killed = self.crash(lambda: fs.hooks.append(_killer(second)))
        return self.inspect("twice", killed)

    def at_syscall(self, call: str, k: int) -> Outcome:
        """Die on entering the ``k``-th (from 1) system call of this kind; needs strace."""
        inject = ["-e", f"inject={call}:signal=KILL:when={k}"]
        killed = self.crash(lambda: None, tracer=lambda pid: _trace(pid, inject, self._log))
        return self.inspect(call if killed else "end", killed)

    def syscalls(self) -> Counter[str]:
        """How often one undisturbed cycle makes each call of :data:`SYSCALLS`; needs strace."""
        self.crash(lambda: None, tracer=lambda pid: _trace(pid, [], self._log))
        self._settle()
        return Counter(re.findall(r"^(\w+)\(", self._log.read_text(errors="replace"), re.MULTILINE))

    @property
    def _log(self) -> Path:
        return self.root.parent / "strace.log"

    def crash(
        self, arm: Arm, after: float | None = None, tracer: Callable[[int], subprocess.Popen] | None = None
    ) -> bool:
        """Run one cycle in a forked process; True when it was killed, False when it finished."""
        acks, go = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            _victim(self.root, arm, acks, go, endless=after is not None)
        os.close(acks[1])
        os.close(go[0])
        trace = tracer(pid) if tracer else None
        os.write(go[1], b"g")
        os.close(go[1])
        if after is not None:
            time.sleep(after)
            os.kill(pid, signal.SIGKILL)
        with os.fdopen(acks[0]) as lines:
            for line in lines.read().split():
                self._note(int(line))
        status = os.waitpid(pid, 0)[1]
        if trace:
            trace.wait(timeout=10)
        if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
            raise RuntimeError(f"the victim failed by itself with exit code {os.WEXITSTATUS(status)}")
        return os.WIFSIGNALED(status)

    def inspect(self, at: str, killed: bool) -> Outcome:
        """Resume in place of the dead process: the last acknowledged step must load, leftovers go, saving works."""
        present = [path.name for path in self.root.iterdir() if path.name.startswith(".")]
        try:
            resumed, faults = self._resume(present)
        except CheckpointError as error:
            return Outcome(at, killed, self.acknowledged, 0, len(present), (f"everything is lost: {error}",))
        return Outcome(at, killed, self.acknowledged, resumed, len(present), tuple(faults))

    def _resume(self, present: list[str]) -> tuple[int, list[str]]:
        expected, faults = self.acknowledged, []
        if checkpoint.search(self.root)[0] is None:
            faults.append("everything is lost before tidying")
        found, lines = checkpoint.newest(self.root)
        if found is None or found.step < expected:
            faults.append(f"step {expected} was acknowledged and is lost")
        elif not _as_saved(found):
            faults.append(f"step {found.step} is lost: it holds something else than was saved")
        faults += [f"{name} not reported" for name in present if not _reported(name, lines)]
        cycle(self.root, self._note, saves=1)
        faults += [f"{path.name} left behind" for path in self.root.iterdir() if path.name.startswith(".")]
        if checkpoint.search(self.root)[1]:
            faults.append("a folder that does not load was left behind")
        return found.step if found else 0, faults


def _victim(root: Path, arm: Arm, acks: tuple[int, int], go: tuple[int, int], endless: bool) -> None:
    """The forked process; never returns."""
    code = 1
    try:
        os.read(go[0], 1)
        arm()
        for _ in itertools.count() if endless else range(1):
            cycle(root, lambda step: os.write(acks[1], f"{step}\n".encode()) and None)
        code = 0
    finally:
        os._exit(code)


def _killer(k: int) -> fs.Hook:
    passed = itertools.count()

    def kill(operation: str, path: Path) -> None:
        if next(passed) == k:
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


def _reported(name: str, lines: list[str]) -> bool:
    """By its own name, or a folder that stepped aside by the name it got back."""
    return any(name in line or name.removeprefix(".was-") in line for line in lines)


def _as_saved(found: checkpoint.Checkpoint) -> bool:
    expected = parts(found.step)
    same = found.parts.keys() == expected.keys() and all(
        found.parts[part].keys() == tensors.keys()
        and all(torch.equal(found.parts[part][name], tensor) for name, tensor in tensors.items())
        for part, tensors in expected.items()
    )
    return same and found.state == {"cursor": found.step}


def _trace(pid: int, inject: list[str], log: Path) -> subprocess.Popen:
    command = ["strace", "-p", str(pid), "-o", str(log), "-e", f"trace={','.join(SYSCALLS)}", *inject]
    trace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    if trace.stderr is None or "attached" not in trace.stderr.readline():
        raise RuntimeError("strace did not attach")
    return trace


def random_times(count: int, seconds: float, seed: int) -> list[float]:
    """Times inside a cycle."""
    chance = random.Random(seed)
    return [chance.uniform(0, seconds) for _ in range(count)]
