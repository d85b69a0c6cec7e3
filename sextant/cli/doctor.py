"""``sextant doctor``: what this machine can do, and how to get what is missing. Missing extras are no error."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

import sextant
from sextant.cli.frame import verb

app = verb()

EXTRAS = {
    "hf": ("transformers", "import and export of transformers weights"),
    "plot": ("matplotlib", "loss curves as PNG"),
    "data": ("pyarrow", "parquet files"),
    "log": ("tensorboard", "TensorBoard logs"),
}
"""Extra of the distribution -> the package that shows it is there, and what it is for."""

TRAINING_BYTES = 16
"""Per parameter in fp32 AdamW: weight, gradient and two moments. Activations come on top, about as much again."""


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False) -> None:
    """What this machine can do: versions, devices, memory, extras."""
    facts = examine()
    if as_json:
        import json

        typer.echo(json.dumps(facts, indent=1))
        return
    from rich.table import Table

    from sextant.cli.frame import console

    view = Table(box=None, pad_edge=False, show_header=False)
    view.add_column(no_wrap=True)
    view.add_column()
    for name, text in lines(facts):
        view.add_row(name, text)
    out = console()
    out.print(view)
    out.print(f"\n{verdict(facts)}", style="bold")


def examine() -> dict[str, Any]:
    """Facts about this machine as plain data; sizes in bytes."""
    import torch

    return {
        "sextant": sextant.__version__, "python": platform.python_version(), "torch": str(torch.__version__),
        "platform": platform.platform(), "cpus": _cpus(), "threads": torch.get_num_threads(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
        "bf16": _bf16(), "triton": _version("triton"), "free_memory": _free_memory(),
        "free_disk": shutil.disk_usage(Path.cwd()).free,
        "extras": {extra: _version(package) for extra, (package, _) in EXTRAS.items()},
    }


def _cpus() -> int:
    """CPUs that this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = f"{properties.major}.{properties.minor}"
    return {"name": properties.name, "capability": capability, "memory": total, "free_memory": free}


def _bf16() -> str:
    """Where bf16 products are fast: ``gpu``, ``cpu`` (native instructions) or ``emulated``."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        return "gpu"
    flags = _read("/proc/cpuinfo")
    return "cpu" if "avx512_bf16" in flags or "amx_bf16" in flags or "bf16" in flags.split() else "emulated"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _free_memory() -> int | None:
    """Memory that a new process can have: what the machine has free, within a container's limit; None if unknown."""
    rows = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)
    free = [int(rows["MemAvailable"].split()[0]) * 1024] if "MemAvailable" in rows else []
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        free.append(int(limit) - int(used))
    return min(free) if free else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What a person reads, as (name, text)."""
    from sextant.core.units import size

    gpus = [f"{g['name']}, {size(g['free_memory'])} of {size(g['memory'])} free" for g in facts["gpus"]]
    free = size(facts["free_memory"]) if facts["free_memory"] is not None else "unknown"
    rows = [
        ("sextant", f"{facts['sextant']} on Python {facts['python']}, {sys.prefix}"),
        ("torch", f"{facts['torch']}, {facts['threads']} threads on {facts['cpus']} CPUs"),
        ("gpu", "; ".join(gpus) or "none: CPU only"),
        ("bf16", facts["bf16"]),
        ("triton", facts["triton"] or "not here (comes with a CUDA build of torch)"),
        ("memory", f"{free} free"),
        ("disk", f"{size(facts['free_disk'])} free in {Path.cwd()}"),
    ]
    for extra, (package, purpose) in EXTRAS.items():
        found = facts["extras"][extra]
        missing = f"missing ({purpose}): pip install 'sextant-lm[{extra}]'"
        rows.append((extra, f"{package} {found}" if found else missing))
    return rows


def verdict(facts: dict[str, Any]) -> str:
    """One line: what can be trained here, and what to run first."""
    from sextant.core.units import count

    gpu = max((g["free_memory"] for g in facts["gpus"]), default=None)
    memory = gpu if gpu is not None else facts["free_memory"]
    room = f", with memory for about {count(memory / (2 * TRAINING_BYTES), 0)} parameters" if memory else ""
    if gpu is None:
        return f"Here: twins, in minutes on the CPU{room}. Start: sextant train mai-base-1"
    return f"Here: single-GPU models{room}. Start: sextant train dense-150m"
