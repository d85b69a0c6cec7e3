"""Pictures of experiments: one colour per arm, one line per seed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sextant.core import fs
from sextant.lab.trained import mean_and_error


def curves(
    path: Path, cells: Mapping[tuple[str, int], Mapping[str, Any]], *, ylabel: str, title: str, column: int = 1
) -> None:
    """A PNG of the ``curve`` of every (arm, seed), and a CSV beside it; ``column`` of a point is drawn."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot(xlabel="step", ylabel=ylabel, title=title)
    arms = list(dict.fromkeys(arm for arm, _ in cells))
    for (arm, seed), cell in cells.items():
        points = cell["curve"]
        label = arm if seed == min(s for a, s in cells if a == arm) else None
        steps, values = [point[0] for point in points], [point[column] for point in points]
        axes.plot(steps, values, color=f"C{arms.index(arm)}", alpha=0.8, linewidth=1, label=label)
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)
    lines = [
        f"{arm},{seed}," + ",".join(map(str, point)) for (arm, seed), cell in cells.items() for point in cell["curve"]
    ]
    fs.write_text(path.with_suffix(".csv"), "\n".join(["arm,seed,step,loss,right", *lines]) + "\n")


def bars(
    path: Path, cells: Mapping[tuple[str, int], Mapping[str, Any]], names: Mapping[str, str], *, ylabel: str, title: str
) -> None:
    """A PNG of single numbers: a group of bars per arm with a dot per seed, and a CSV beside it.

    Args:
        names: keys of a cell, and what the legend calls them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot(ylabel=ylabel, title=title)
    arms, width = list(dict.fromkeys(arm for arm, _ in cells)), 0.8 / len(names)
    for index, (key, label) in enumerate(names.items()):
        values = [[cell[key] for (name, _), cell in cells.items() if name == arm] for arm in arms]
        places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(arms))]
        axes.bar(places, [sum(own) / len(own) for own in values], width, label=label, color=f"C{index}", alpha=0.6)
        for place, own in zip(places, values, strict=True):
            axes.plot([place] * len(own), own, ".", color="black", markersize=4)
    axes.set_xticks(range(len(arms)), arms)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    save(figure, path)
    lines = [f'"{arm}",{seed},' + ",".join(str(cell[key]) for key in names) for (arm, seed), cell in cells.items()]
    fs.write_text(path.with_suffix(".csv"), "\n".join([",".join(["arm", "seed", *names]), *lines]) + "\n")


def gaps(path: Path, groups: Mapping[str, Mapping[str, Sequence[float]]], *, xlabel: str, title: str) -> None:
    """A PNG of differences: a line for each name, with a small dot per seed and a large one with its standard error.

    Args:
        groups: what the differences are from, which names a colour; in it the name and its values by seed.
    """
    from matplotlib.figure import Figure

    rows = [(base, name, values) for base, group in groups.items() for name, values in group.items()]
    figure = Figure(figsize=(7, 1.2 + 0.3 * len(rows)))
    axes = figure.add_subplot(xlabel=xlabel)
    axes.set_title(title, pad=28)
    for place, (base, name, values) in enumerate(rows):
        color = f"C{list(groups).index(base)}"
        mean, error = mean_and_error(list(values))
        label = base if name == next(iter(groups[base])) else None
        axes.plot(values, [place] * len(values), ".", color=color, alpha=0.5)
        axes.errorbar(mean, place, xerr=error, fmt="o", capsize=3, color=color, label=label)
    axes.set_yticks(range(len(rows)), [name for _, name, _ in rows])
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    save(figure, path)


def numbers(path: Path, cells: Mapping[tuple[str, int], Mapping[str, Any]], names: Sequence[str]) -> None:
    """A CSV of single numbers of every cell."""
    lines = [f"{arm},{seed}," + ",".join(f"{cell[name]:.5f}" for name in names) for (arm, seed), cell in cells.items()]
    fs.write_text(path, "\n".join([",".join(["arm", "seed", *names]), *lines]) + "\n")


def save(figure: Any, path: Path) -> None:
    """Written whole or not at all."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120, bbox_inches="tight")
    fs.write_bytes(path, image.getvalue())
