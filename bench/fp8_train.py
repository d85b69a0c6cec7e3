"""Train the mixture of the one-GPU bench in bf16 and under both FP8 recipes: loss by step, speed, saturated casts.

    python bench/fp8_train.py --out bench/results/fp8_train.json            # on a GPU: 500 steps, seeds 0 1 2
    python bench/fp8_train.py --code python-code --out code.json            # on more text than it reads: one pass
    python bench/fp8_train.py --device cpu --tiny --steps 4 --seeds 0 --out dry.json # the same script, tiny
    python bench/fp8_train.py --profile --seeds 0 --out profile.json        # three steps of each under the profiler

Each run is a process of its own, so that memory and compiled code are its own. The file is written after each run;
runs that it already holds are not repeated.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sextant import recipes
from sextant.axes.numerics import BF16, AnyNumerics, FP8Blocks, FP8Delayed
from sextant.data.prepare import prepare
from sextant.kernels import fp8
from sextant.train.folder import RunFolder
from sextant.train.loop import Trainer
from sextant.train.run import Run

POLICIES: dict[str, AnyNumerics] = {"bf16": BF16(), "fp8_delayed": FP8Delayed(), "fp8_blocks": FP8Blocks()}
PARTS: dict[str, AnyNumerics] = {
    "bf16_forward": FP8Delayed(forward="bf16"), "bf16_gradient": FP8Delayed(data_gradient="bf16"),
    "e4m3_gradient": FP8Delayed(data_gradient="e4m3"), "16_steps": FP8Delayed(history=16),
}
"""Delayed scaling with one part changed: run where asked for, to find what sets it apart."""
RECIPE, TINY = "moe-400m-a100m", "mai-base-1"
PROFILED = 3
"""Steps under the profiler."""


def declared(policy: str, seed: int, options: argparse.Namespace) -> Run:
    """The recipe's run with another policy and seed; evaluated at its end, never saved."""
    run = recipes.get(TINY if options.tiny else RECIPE).twin()
    run = run.replace(
        numerics=(POLICIES | PARTS)[policy], seed=seed, steps=options.steps,
        compile=not (options.eager or options.tiny),
        eval_every=10**6, sample_every=10**6, save_every=10**6, log_every=max(1, options.steps // 10),
    )
    if options.rows:
        micro_rows = options.micro_rows or min(options.rows, run.batch.micro_rows)
        run = run.replace(batch=run.batch.replace(rows=options.rows, micro_rows=micro_rows))
    if options.code:
        run = run.replace(data=run.data.replace(source=str(code(options.code, run.data.vocab))))
    if options.tiny:
        run = run.replace(
            data=run.data.replace(seq_len=64), batch=run.batch.replace(rows=2, micro_rows=2), eval_tokens=256,
        )
    return run


def code(folder: Path, vocab: int) -> Path:
    """Python sources of torch and transformers, a text for one pass where the books are read many times."""
    if folder.exists():
        return folder
    packages = [Path(torch.__file__).parent, Path(torch.__file__).parents[1] / "transformers"]
    files = [file for package in packages for file in sorted(package.rglob("*.py"))]
    with tempfile.TemporaryDirectory() as where:
        rows = Path(where) / "sources.jsonl"
        with rows.open("w") as out:
            for file in files:
                if text := file.read_text(errors="ignore").strip():
                    out.write(json.dumps({"text": text}) + "\n")
        prepare([rows], folder, vocab=vocab, heldout=0.01, quiet=True)
    return folder


def measured(policy: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one run here; medians over the steps after the first tenth."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as where:
        with RunFolder(Path(where) / policy) as folder:
            trainer = Trainer(declared(policy, seed, options), folder, options.device)
            while trainer.step < options.steps:
                trainer._advance()
            heldout = trainer._evaluate(None)
        lines = (Path(where) / policy / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    warm = steps[len(steps) // 10 :]
    return {
        "policy": policy, "seed": seed, "recipe": trainer.run.name, "steps": len(steps), "compile": trainer.run.compile,
        "tokens_per_step": steps[0]["tokens"], "passes": round(trainer.tokens / trainer.train_shards.tokens, 2),
        "micro_rows": trainer.run.batch.micro_rows, "losses": [round(step["loss"], 5) for step in steps],
        "heldout": round(heldout.loss, 5), "saturated": [step["saturated"] for step in steps], "paths": fp8.paths(),
        "peak_bytes": steps[-1]["memory"],
        "tokens_per_second": statistics.median(step["tokens_per_second"] for step in warm),
        "mfu": statistics.median(step["mfu"] or 0.0 for step in warm), "first_step_seconds": steps[0]["seconds"],
        "wall_seconds": time.monotonic() - began, "device": device_name(options.device), "torch": torch.__version__,
        "python": platform.python_version(),
    }


def profiled(policy: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Where three steps spend their time after others: busy time of the device, launches, and the largest shares."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (options.device == "cuda")
    with tempfile.TemporaryDirectory() as where, RunFolder(Path(where) / policy) as folder:
        trainer = Trainer(declared(policy, seed, options), folder, options.device)
        while trainer.step < options.steps:
            trainer._advance()
        with profile(activities=activities) as seen:
            for _ in range(PROFILED):
                trainer._advance()
    averages = seen.key_averages()
    kernels = [event for event in averages if event.device_type == DeviceType.CUDA]
    here = [event for event in averages if event.device_type == DeviceType.CPU]
    return {
        "policy": policy, "seed": seed, "steps": options.steps,
        "busy_ms": sum(event.self_device_time_total for event in kernels) / 1e3 / PROFILED,
        "launches": sum(event.count for event in kernels) // PROFILED,
        "kernels": largest(kernels, "self_device_time_total"), "host": largest(here, "self_cpu_time_total"),
    }


def largest(events: list[Any], by: str, count: int = 25) -> list[tuple[str, float, int]]:
    """Name, milliseconds a step, calls a step."""
    events = sorted(events, key=lambda event: -getattr(event, by))[:count]
    per_step = 1e3 * PROFILED
    return [(event.key[:100], round(getattr(event, by) / per_step, 3), event.count // PROFILED) for event in events]


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()


def in_a_process(policy: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run in a fresh interpreter, which writes its result to a file."""
    with tempfile.TemporaryDirectory() as where:
        result = Path(where) / "row.json"
        command = [
            sys.executable, __file__, "--one", policy, str(seed), "--steps", str(options.steps), "--device",
            options.device, "--out", str(result), *(["--tiny"] if options.tiny else []),
            *(["--code", str(options.code)] if options.code else []),
            *(["--rows", str(options.rows)] if options.rows else []),
            *(["--micro-rows", str(options.micro_rows)] if options.micro_rows else []),
            *(["--eager"] if options.eager else []), *(["--way", options.way] if options.way else []),
            *(["--profile"] if options.profile else []),
        ]
        subprocess.run(command, check=True)
        return json.loads(result.read_text())


def written(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    path.write_text(f'{{"rows":[\n{text}\n]}}\n')


def summary(rows: list[dict[str, Any]]) -> str:
    """A table: mean of the last tenth of the losses, speed beside bf16's."""
    base = [row["tokens_per_second"] for row in rows if row["policy"] == "bf16"]
    names = f"{'policy':13} {'seed':>4} {'last loss':>9} {'held out':>8}"
    lines = [f"{names} {'tok/s':>9} {'x bf16':>6} {'mfu':>5} {'GiB':>5} saturated"]
    for row in rows:
        last = statistics.fmean(row["losses"][-max(1, len(row["losses"]) // 10) :])
        ratio = f"{row['tokens_per_second'] / statistics.median(base):.2f}" if base else "-"
        lines.append(
            f"{row['policy']:13} {row['seed']:4} {last:9.4f} {row['heldout']:8.4f} "
            f"{row['tokens_per_second']:9.0f} {ratio:>6} "
            f"{100 * row['mfu']:4.0f}% {row['peak_bytes'] / 2**30:5.1f} {sum(row['saturated'])}"
        )
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rows", type=int, help="sequences a step, instead of the recipe's")
    parser.add_argument("--micro-rows", type=int, help="of them at a time; with --rows")
    parser.add_argument("--code", type=Path, metavar="FOLDER", help="Python sources, prepared there, not the books")
    parser.add_argument("--policies", nargs="*", default=list(POLICIES), choices=[*POLICIES, *PARTS])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the twin of MAI-Base-1 with 2 rows of 64 tokens")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--way", choices=list(fp8.WAYS), help="how FP8 products run; default: the first that works")
    parser.add_argument("--profile", action="store_true", help="three steps under the profiler after --steps others")
    parser.add_argument("--one", nargs=2, metavar=("POLICY", "SEED"), help="one run in this process")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    if options.one:
        fp8.only(options.way)
        job = profiled if options.profile else measured
        options.out.write_text(json.dumps(job(options.one[0], int(options.one[1]), options)))
        return
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    held = {(row["policy"], row["seed"], row["steps"]) for row in rows}
    for seed in options.seeds:
        for policy in options.policies:
            if (policy, seed, options.steps) not in held:
                rows.append(in_a_process(policy, seed, options))
                written(options.out, rows)
    if options.profile:
        return
    print(summary(rows))
    for kind, way in sorted({item for row in rows for item in row["paths"].items()}):
        print(f"{kind}: {way}")


if __name__ == "__main__":
    main()
