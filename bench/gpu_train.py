"""Train the one-GPU recipes and report tokens/s, MFU and peak memory, compiled and eager.

    python bench/gpu_train.py --out bench/results/gpu_train.json            # on a GPU
    python bench/gpu_train.py --dry --out /tmp/dry.json                     # the same script on a CPU, tiny
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from sextant import recipes
from sextant.train.folder import RunFolder
from sextant.train.loop import Trainer
from sextant.train.run import Run


def measure(run: Run, folder_path: Path, device: str) -> dict[str, Any]:
    """One run from start to end; medians over the steps after the first tenth."""
    began = time.monotonic()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with RunFolder(folder_path) as folder:
        result = Trainer(run, folder, device).fit()
    steps = [json.loads(line) for line in (folder_path / "metrics.jsonl").read_text().splitlines()]
    warm = steps[len(steps) // 10 :]
    return {
        "recipe": run.name, "compile": run.compile, "numerics": run.numerics.kind, "steps": run.steps,
        "tokens_per_step": run.batch.rows * run.data.seq_len,
        "tokens_per_second": statistics.median(step["tokens_per_second"] for step in warm),
        "mfu": statistics.median(step["mfu"] or 0.0 for step in warm), "peak_bytes": steps[-1]["memory"],
        "first_step_seconds": steps[0]["seconds"], "wall_seconds": time.monotonic() - began,
        "first_loss": steps[0]["loss"], "last_loss": steps[-1]["loss"], "heldout_bpb": result.bpb,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--only", nargs="*", default=["dense-150m", "moe-400m-a100m"])
    parser.add_argument("--eager", action="store_true", help="also 40 steps without torch.compile")
    parser.add_argument("--dry", action="store_true", help="nano on a CPU for 6 steps: proves the script")
    arguments = parser.parse_args()
    device = "cpu" if arguments.dry else "cuda"
    plans = [recipes.get(name).twin().replace(compile=True, steps=arguments.steps) for name in arguments.only]
    if arguments.eager:
        plans += [run.replace(compile=False, steps=40) for run in plans]
    if arguments.dry:
        plans = [recipes.get("nano").twin().replace(compile=False, steps=6)]
    rows = []
    for number, run in enumerate(plans):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(run, Path(folder) / str(number), device))
        print(json.dumps(rows[-1]), flush=True)
        name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
        machine = {"device": name, "torch": torch.__version__, "python": platform.python_version()}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
