"""Pictures of a run beside the numbers they show: loss, learning rate and expert load, as PNG and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sextant.core import fs
from sextant.train.folder import records

Rows = list[dict[str, Any]]


def draw(run_folder: Path) -> list[Path]:
    """Write ``plots/{loss,lr,load}.csv``, and the PNGs when matplotlib is installed; returns what was written."""
    steps = records(run_folder / "metrics.jsonl")
    heldout = [row for row in records(run_folder / "events.jsonl") if row.get("event") == "heldout"]
    if not steps:
        return []
    tables = {
        "loss": _table(("step", "tokens", "loss", "bpb", "gnorm"), steps),
        "heldout": _table(("step", "loss", "bpb"), heldout),
        "lr": _table(("step", "lr", "rows"), steps),
        "load": _load_table(steps),
    }
    folder = run_folder / "plots"
    written = [write_csv(folder / f"{name}.csv", *table) for name, table in tables.items() if table[1]]
    try:
        import matplotlib
    except ImportError:
        return written
    matplotlib.use("agg")
    drawn = [_draw_loss(folder, steps, heldout), _draw_lr(folder, steps), _draw_load(folder, steps)]
    return written + [path for path in drawn if path is not None]


def heldout_curve(run_folder: Path) -> tuple[list[int], list[float]]:
    """Steps and held-out bits per byte of a run; an evaluation repeated after a resume counts once."""
    curve = {row["step"]: row["bpb"] for row in records(run_folder / "events.jsonl") if row.get("event") == "heldout"}
    return list(curve), list(curve.values())


def _table(columns: Sequence[str], rows: Rows) -> tuple[Sequence[str], list[list[Any]]]:
    return columns, [[row.get(column) for column in columns] for row in rows]


def _load_table(steps: Rows) -> tuple[Sequence[str], list[list[Any]]]:
    loads = [(row["step"], int(layer), load) for row in steps for layer, load in row["load"].items()]
    names = list(loads[0][2]) if loads else []
    return ("step", "layer", *names), [[step, layer, *(load.get(n) for n in names)] for step, layer, load in loads]


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """A table with a header line; returns the path."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    fs.write_text(path, text.getvalue())
    return path


def save_png(figure: Any, path: Path) -> Path:
    """A matplotlib figure; returns the path."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120, bbox_inches="tight")
    fs.write_bytes(path, image.getvalue())
    return path


def _draw_loss(folder: Path, steps: Rows, heldout: Rows) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot(xlabel="step", ylabel="bits per byte", title="Loss")
    axes.plot([row["step"] for row in steps], [row["bpb"] for row in steps], linewidth=0.8, label="training")
    if heldout:
        axes.plot([row["step"] for row in heldout], [row["bpb"] for row in heldout], "o-", label="held out")
    axes.grid(alpha=0.3)
    axes.legend()
    return save_png(figure, folder / "loss.png")


def _draw_lr(folder: Path, steps: Rows) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3))
    axes = figure.add_subplot(xlabel="step", ylabel="learning rate", title="Schedule")
    axes.plot([row["step"] for row in steps], [row["lr"] for row in steps])
    axes.grid(alpha=0.3)
    return save_png(figure, folder / "lr.png")


def _draw_load(folder: Path, steps: Rows) -> Path | None:
    """Busiest expert over the mean, MoE layer by step: dark is even."""
    layers = sorted({int(layer) for row in steps for layer in row["load"]})
    if not layers:
        return None
    from matplotlib.figure import Figure

    peaks = [[row["load"][str(layer)]["max_over_mean"] for row in steps if row["load"]] for layer in layers]
    figure = Figure(figsize=(7, 1.2 + 0.35 * len(layers)))
    axes = figure.add_subplot(xlabel="step", ylabel="MoE layer", title="Expert load, max / mean")
    extent = (steps[0]["step"] - 0.5, steps[-1]["step"] + 0.5, len(layers) - 0.5, -0.5)
    image = axes.imshow(peaks, aspect="auto", interpolation="nearest", extent=extent, vmin=1.0)
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    figure.colorbar(image, ax=axes)
    return save_png(figure, folder / "load.png")
