"""Kill a saving process hundreds of times and count what is lost.

    python bench/kill_sweep.py --points 500

Half of the points die just before a primitive step of a save, a replacement or a retention delete (each step in turn,
every fourth one twice in a row), half at a random time. With strace installed, a further sweep dies on entering each
system call that touches files. Writes ``bench/results/kill_sweep.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sextant.train.folder import environment  # noqa: E402
from tests.train import killpoints  # noqa: E402


def main() -> int:
    options = parse()
    torch.set_num_threads(1)  # before any work: the victims are forked
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        sweep = killpoints.Sweep(Path(folder) / "checkpoints")
        outcomes = {"primitive": list(at_primitives(sweep, options.points - options.points // 2))}
        outcomes["timer"] = list(at_times(sweep, options.points // 2, options.seed))
        if shutil.which("strace"):
            outcomes["strace"] = list(at_syscalls(sweep, options.points // 2))
    result = summary(outcomes, time.monotonic() - began, options)
    print_table(result)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["total"]["faults"] else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--points", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where the victims write; the system's temporary folder by default")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "kill_sweep.json")
    return parser.parse_args()


def at_primitives(sweep: killpoints.Sweep, points: int) -> Iterable[killpoints.Outcome]:
    """Each primitive step in turn, as often as the points allow."""
    steps = len(sweep.operations)
    for point in range(points):
        yield sweep.twice(point % steps, point // 4 % 12) if point % 4 == 3 else sweep.at_primitive(point % steps)


def at_times(sweep: killpoints.Sweep, points: int, seed: int) -> Iterable[killpoints.Outcome]:
    """Random times within about one cycle of a process that saves without end."""
    for seconds in killpoints.random_times(points, sweep.seconds, seed):
        yield sweep.at_time(seconds)


def at_syscalls(sweep: killpoints.Sweep, points: int) -> Iterable[killpoints.Outcome]:
    """System calls spread evenly over all that one cycle makes."""
    calls = [(call, k + 1) for call, count in sorted(sweep.syscalls().items()) for k in range(count)]
    points = min(points, len(calls))
    for point in range(points):
        yield sweep.at_syscall(*calls[point * len(calls) // points])


def summary(
    outcomes: dict[str, list[killpoints.Outcome]], seconds: float, options: argparse.Namespace
) -> dict[str, Any]:
    everything = [outcome for group in outcomes.values() for outcome in group]
    return {
        "points": options.points,
        "seed": options.seed,
        "seconds": round(seconds, 1),
        "machine": {key: environment()[key] for key in ("cpu", "cpus", "python", "torch", "commit")},
        "system": platform.system(),
        "total": counts(everything),
        "sweeps": {name: sweep_counts(group) for name, group in outcomes.items()},
        "faults": sorted({fault for outcome in everything for fault in outcome.faults}),
    }


def sweep_counts(group: list[killpoints.Outcome]) -> dict[str, Any]:
    places = sorted({outcome.at for outcome in group})
    return {**counts(group), "at": {at: counts([o for o in group if o.at == at]) for at in places}}


def counts(group: list[killpoints.Outcome]) -> dict[str, int]:
    return {
        "points": len(group),
        "killed": sum(outcome.killed for outcome in group),
        "lost": sum(any("lost" in fault for fault in outcome.faults) for outcome in group),
        "faults": sum(bool(outcome.faults) for outcome in group),
        "leftovers_removed": sum(outcome.leftovers for outcome in group),
    }


def print_table(result: dict[str, Any]) -> None:
    print(f"{'sweep':<10} {'died at':<14} {'points':>7} {'killed':>7} {'lost':>5} {'faults':>7} {'leftovers':>10}")
    for name, sweep in result["sweeps"].items():
        for at, row in sweep["at"].items():
            print_row(name, at, row)
    print_row("total", "", result["total"])
    print(f"{result['seconds']} s")


def print_row(name: str, at: str, row: dict[str, int]) -> None:
    numbers = (
        f"{row['points']:>7} {row['killed']:>7} {row['lost']:>5} {row['faults']:>7} {row['leftovers_removed']:>10}"
    )
    print(f"{name:<10} {at:<14} {numbers}")


if __name__ == "__main__":
    sys.exit(main())
