"""Two or more runs over the same seeds: each seed fixes weights and data order for all of them, so differences pair."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sextant.core import fs, units
from sextant.core.cost import At
from sextant.train.folder import RunFolder
from sextant.train.loop import Trainer
from sextant.train.plots import heldout_curve
from sextant.train.run import Run

_T975 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Student's t at 97.5 % by number of pairs."""


@dataclass(frozen=True)
class Arm:
    """One run of the comparison: final held-out bits per byte by seed."""

    name: str
    params: int
    active_params: int
    bpb: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return sum(self.bpb) / len(self.bpb)


def compare(runs: Sequence[Run], seeds: Sequence[int], out: Path, say: Callable[[str], None]) -> list[Arm]:
    """Train every run at every seed; resumes where it was stopped. Writes ``results.csv`` and ``curves.png``."""
    results: dict[str, list[float]] = {run.name: [] for run in runs}
    for seed in seeds:
        for run in runs:
            seeded = run.replace(seed=seed, data=run.data.replace(seed=seed))
            with RunFolder(out / f"{run.name}-seed{seed}") as folder:
                result = Trainer(seeded, folder, "cpu", lambda line: None).fit()
            results[run.name].append(result.bpb)
            say(f"seed {seed} {run.name}: {result.bpb:.4f} bits per byte")
    arms = [_arm(run, results[run.name]) for run in runs]
    _write_csv(out / "results.csv", arms, seeds)
    _draw(out, arms, seeds)
    return arms


def _arm(run: Run, bpb: list[float]) -> Arm:
    cost = run.model.cost(At(run.data.seq_len))
    return Arm(run.name, cost.params, cost.active_params, tuple(bpb))


def difference(a: Arm, b: Arm) -> tuple[float, float]:
    """Mean of ``a - b`` over paired seeds, and half of its 95 % interval."""
    pairs = [x - y for x, y in zip(a.bpb, b.bpb, strict=True)]
    mean = sum(pairs) / len(pairs)
    if len(pairs) < 2:
        return mean, math.inf
    variance = sum((pair - mean) ** 2 for pair in pairs) / (len(pairs) - 1)
    return mean, _T975.get(len(pairs), 2.0) * math.sqrt(variance / len(pairs))


def table(arms: Sequence[Arm]) -> str:
    """Markdown: every arm by seed, and its difference from the last."""
    seeds = " | ".join(f"seed {i}" for i in range(len(arms[0].bpb)))
    lines = [f"| run | parameters | active | {seeds} | mean | minus {arms[-1].name} |"]
    lines.append("|---" * (5 + len(arms[0].bpb)) + "|")
    for arm in arms:
        by_seed = " | ".join(f"{value:.4f}" for value in arm.bpb)
        mean, half = difference(arm, arms[-1])
        gap = "" if arm is arms[-1] else f"{mean:+.4f} ± {half:.4f}"
        sizes = f"{units.count(arm.params)} | {units.count(arm.active_params)}"
        lines.append(f"| {arm.name} | {sizes} | {by_seed} | {arm.mean:.4f} | {gap} |")
    return "\n".join(lines)


def _write_csv(path: Path, arms: Sequence[Arm], seeds: Sequence[int]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "params", "active_params", "seed", "bpb"])
    for arm in arms:
        sizes = (arm.name, arm.params, arm.active_params)
        writer.writerows((*sizes, seed, value) for seed, value in zip(seeds, arm.bpb, strict=True))
    fs.write_text(path, text.getvalue())


def _draw(out: Path, arms: Sequence[Arm], seeds: Sequence[int]) -> None:
    """Held-out curves, one thin line per seed and one colour per run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot(xlabel="step", ylabel="bits per byte, held out", title="Paired seeds")
    for index, arm in enumerate(arms):
        for seed in seeds:
            steps, values = heldout_curve(out / f"{arm.name}-seed{seed}")
            label = f"{arm.name} ({units.count(arm.active_params)} active)" if seed == seeds[0] else None
            axes.plot(steps, values, color=f"C{index}", alpha=0.8, linewidth=1, label=label)
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120, bbox_inches="tight")
    fs.write_bytes(out / "curves.png", image.getvalue())
