"""What attention costs with length: step time and peak memory of one layer, and of a four-layer model, by pattern.

A step is forward and backward (of the whole model also loss, clipping and AdamW) of one sequence. Every figure comes
from a process of its own. Memory is what the step adds: on a CPU the rise of the resident peak, on a GPU that of the
allocator. Times are the best of a few steps; read ratios, which on a CPU are those of processor time (all threads),
because neighbours on the machine disturb it least.

    OMP_NUM_THREADS=2 python bench/attention_cpu.py --out bench/results/attention_cpu
    python bench/attention_cpu.py --device cuda --dtype bf16 --lengths 2k,4k,8k,16k,64k \\
        --out bench/results/attention_h100
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sextant.axes.attention import NSA, Full, Lightning, Mixer, MLPPhi, MoBA, Pattern, Window
from sextant.axes.capacity import Dense
from sextant.axes.kv import GQA, RoPE
from sextant.axes.numerics import BF16, FP32
from sextant.axes.stability import PreNorm, RMSNorm
from sextant.core.allocator import keep_freed_memory
from sextant.core.stream import Stream
from sextant.model.spec import Layer, ModelSpec
from sextant.model.transformer import Transformer
from sextant.train.loss import Balance, micro_loss

WIDTH, HEADS, GROUPS, HEAD_DIM, LAYERS, VOCAB = 256, 4, 2, 64, 4, 4096
KINDS: dict[str, Pattern | Mixer] = {
    "full": Full(),
    "window": Window(window=512),
    "moba": MoBA(block=512, top_k=3),
    "moba 256": MoBA(block=256, top_k=3),
    "nsa": NSA(length=32, stride=16, block=64, top_k=8, window=512, phi=MLPPhi(hidden=64)),
    "lightning": Lightning(heads=HEADS, head_dim=HEAD_DIM),
}
COLUMNS = ("job", "kind", "tokens", "dtype", "seconds", "work_seconds", "bytes", "error")
SECONDS = 3.0
"""Steps are repeated for about this long."""


def build(kind: str, layers: int, context: int, dtype: str, device: str) -> Transformer:
    pattern = KINDS[kind]
    kv = None if isinstance(pattern, Mixer) else GQA(heads=HEADS, kv_heads=GROUPS, head_dim=HEAD_DIM, position=RoPE())
    layer: Any = Layer(
        attention=pattern, kv=kv, feed_forward=Dense(hidden=3 * WIDTH), residual=PreNorm(norm=RMSNorm())  # type: ignore[arg-type]
    )
    spec = ModelSpec(
        name=kind, vocab=VOCAB, width=WIDTH, context=context, final_norm=RMSNorm(), layers=(layer,) * layers
    )
    return spec.build(BF16() if dtype == "bf16" else FP32(), device=device).train()


def layer_step(kind: str, tokens: int, dtype: str, device: str) -> Callable[[], None]:
    """Attention alone, its projections included."""
    attention: Any = build(kind, 1, tokens, dtype, device).get_submodule("blocks.0.attention")
    stream = Stream.of_lengths([tokens], device)
    lower = torch.bfloat16 if dtype == "bf16" else torch.float32
    x_TD, dy_TD = (torch.randn(tokens, WIDTH, device=device, dtype=lower) for _ in range(2))
    x_TD.requires_grad_()

    def step() -> None:
        attention(x_TD, stream)[0].backward(dy_TD)
        x_TD.grad = None
        attention.zero_grad(set_to_none=True)

    return step


def model_step(kind: str, tokens: int, dtype: str, device: str) -> Callable[[], None]:
    """A whole training step."""
    model = build(kind, LAYERS, tokens, dtype, device)
    optimiser, balance = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), Balance(model.spec)
    stream = Stream.of_lengths([tokens], device)
    tokens_T = torch.randint(2, VOCAB, (tokens + 1,), device=device)

    def step() -> None:
        balance.start()
        loss = micro_loss(model, tokens_T[:-1], tokens_T[1:], stream, balance, tokens, tokens)
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


JOBS = {"layer": layer_step, "model": model_step}


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(step: Callable[[], None], device: str) -> tuple[float, float]:
    """Seconds by the clock, and of work: processor time of all threads on a CPU, the same as the clock on a GPU."""
    began, worked = time.perf_counter(), time.process_time()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return seconds, seconds if device == "cuda" else time.process_time() - worked


def measure(job: str, kind: str, tokens: int, dtype: str, device: str) -> dict[str, float]:
    """In a process of its own: seconds of a step and bytes that it adds."""
    keep_freed_memory()
    timed(JOBS[job](kind, 64, dtype, device), device)  # libraries load what they need
    step = JOBS[job](kind, tokens, dtype, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak_bytes(device)
    first, _ = timed(step, device)
    added = peak_bytes(device) - before
    repeats = max(2, min(20, int(SECONDS / first)))
    seconds, work = (min(column) for column in zip(*(timed(step, device) for _ in range(repeats)), strict=True))
    return {"seconds": seconds, "work_seconds": work, "bytes": added}


def in_a_process(*words: str) -> dict[str, Any]:
    command, env = [sys.executable, __file__, "--one", *words], os.environ | {"OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:200]}


def size(text: str) -> int:
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


def machine(device: str) -> str:
    card = torch.cuda.get_device_name() if device == "cuda" else f"{os.environ.get('OMP_NUM_THREADS', 'all')} threads"
    return f"{card}, torch {torch.__version__}, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}"


def table(rows: list[dict[str, Any]], job: str) -> str:
    """Markdown: milliseconds and MiB of every kind by length, and how many times faster than full attention."""
    lengths = sorted({row["tokens"] for row in rows})
    heads = [f"one {job}", *(f"{n // 1024} k" for n in lengths)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    full = {row["tokens"]: row.get("work_seconds") for row in rows if row["kind"] == "full" and row["job"] == job}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        here = {row["tokens"]: row for row in rows if row["kind"] == kind and row["job"] == job}
        cells = [cell(here.get(n, {}), full.get(n)) for n in lengths]
        lines.append("| " + " | ".join([kind, *cells]) + " |")
    return "\n".join(lines)


def cell(row: dict[str, Any], full: float | None) -> str:
    if "seconds" not in row:
        return row.get("error", "-")
    gain = f" ({full / row['work_seconds']:.1f}x)" if full else ""
    return f"{row['seconds'] * 1e3:,.0f} ms{gain}, {row['bytes'] / 2**20:,.0f} MiB"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    jobs = list(dict.fromkeys(row["job"] for row in rows))
    figure, grid = plt.subplots(len(jobs), 2, figsize=(10, 3.8 * len(jobs)), squeeze=False)
    for (seconds, memory), job in zip(grid, jobs, strict=True):
        for kind in dict.fromkeys(row["kind"] for row in rows):
            here = [row for row in rows if (row["kind"], row["job"]) == (kind, job) and "work_seconds" in row]
            lengths = [row["tokens"] for row in here]
            seconds.plot(lengths, [row["work_seconds"] for row in here], "o-", markersize=3, label=kind)
            memory.plot(lengths, [max(1, row["bytes"]) / 2**20 for row in here], "o-", markersize=3, label=kind)
        seconds.set(title=f"Seconds of work (all threads) of a step, one {job}", xlabel="sequence length", yscale="log")
        memory.set(title=f"MiB that a step adds, one {job}", xlabel="sequence length", yscale="log")
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        axes.set_xscale("log", base=2)
    grid[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save(rows: list[dict[str, Any]], out: Path, device: str) -> None:
    settings = "; ".join(f"{kind}: {pattern.model_dump_json(exclude_defaults=True)}" for kind, pattern in KINDS.items())
    shape = f"{HEADS} heads of {HEAD_DIM}, {GROUPS} KV heads, width {WIDTH}; the model has {LAYERS} layers"
    tables = "\n\n".join(table(rows, job) for job in dict.fromkeys(row["job"] for row in rows))
    out.with_suffix(".md").write_text(f"{machine(device)}\n\n{shape}. {settings}\n\n{tables}\n")
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([row.get(column, "") for column in COLUMNS] for row in rows)
    try:
        plot(rows, out.with_suffix(".png"))
    except ImportError:
        print("no matplotlib: no picture", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--lengths", default="2k,4k,8k,16k")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=5)
    arguments = parser.parse_args()
    if arguments.one:
        job, kind, tokens, dtype, device = arguments.one
        print(json.dumps(measure(job, kind, int(tokens), dtype, device)))
        return
    rows = []
    for job in arguments.jobs.split(","):
        for tokens in map(size, arguments.lengths.split(",")):
            for kind in arguments.kinds.split(","):
                what = {"job": job, "kind": kind, "tokens": tokens, "dtype": arguments.dtype}
                rows.append(what | in_a_process(job, kind, str(tokens), arguments.dtype, arguments.device))
                print(f"{job:6} {tokens:6} {kind:10} {cell(rows[-1], None)}", file=sys.stderr, flush=True)
                if arguments.out:
                    save(rows, arguments.out, arguments.device)
        print(table(rows, job), end="\n\n")


if __name__ == "__main__":
    main()
