"""What does attention that starts switched off do to router load through early training?

    python docs/lab/zero_gain_load.py out/        # about 15 minutes on one core; resumes, --arms/--seeds share the work

Eight sandwich-norm layers, each a mixture of 16 experts of which a token meets two, rows of unit variance. The output
gain of attention starts at 0 or at 1; either without any balance term, or with MAI-Base-1's. Load by step and layer.
"""

from __future__ import annotations

from pathlib import Path

from sextant.axes.capacity import Experts
from sextant.axes.routing import Auxiliary, SoftmaxTopK
from sextant.axes.stability import SandwichNorm
from sextant.core import fs
from sextant.lab import grid
from sextant.lab.pictures import save
from sextant.lab.trained import mean_and_error, mixture, table, train
from sextant.train.run import Run

ARMS = {
    "gain 0": (0.0, ()),
    "gain 1": (1.0, ()),
    "gain 0 balanced": (0.0, (Auxiliary(coef=1e-2, scope="global_batch"),)),
    "gain 1 balanced": (1.0, (Auxiliary(coef=1e-2, scope="global_batch"),)),
}
MEASURES = {
    "max_over_mean": ("busiest expert / mean", 1, 8),
    "unused": ("share of experts unused", 0, 0.5),
    "entropy": ("entropy of load (1 is even)", 0.5, 1),
}
"""What is drawn, its name and the ends of its colours."""
SHOWN = (1, 5, 10, 20, 50, 100, 200)


def run(gain: float, balance: tuple, steps: int) -> Run:
    experts = Experts(experts=16, hidden=32, router=SoftmaxTopK(top_k=2), balance=balance)
    residual = SandwichNorm(attention_gain=gain)
    return mixture(experts, layers=8, steps=steps, residual=residual, embedding_scale=20.0)


def cell(arm: str, seed: int, steps: int) -> grid.Cell:
    """Each measure as rows of steps, one number per layer."""
    done = train(run(*ARMS[arm], steps), seed)
    loads = {name: [[load[name] for load in line["load"].values()] for line in done.metrics] for name in MEASURES}
    return {"loss": done.loss, "curve": done.curve(), **loads, **{f"late {n}": done.late(n) for n in MEASURES}}


def by_step(cells: dict[tuple[str, int], grid.Cell]) -> str:
    """Markdown: max/mean and unused share, first and last layer, at some steps; means over seeds ± standard error."""
    arms, seeds = list(dict.fromkeys(arm for arm, _ in cells)), sorted({seed for _, seed in cells})
    lines = []
    for name in MEASURES:
        total = len(cells[arms[0], seeds[0]][name])
        steps = [step for step in (*SHOWN, total) if step <= total]
        lines.append(f"\n| {name} | layers | " + " | ".join(f"step {step}" for step in steps) + " |")
        lines.append("|---" * (len(steps) + 2) + "|")
        for arm in arms:
            ran = [cells[arm, seed][name] for seed in seeds]
            for title, layers in (("first", slice(1)), ("last", slice(-1, None)), ("all", slice(None))):
                shown = " | ".join(at_step([one[step - 1][layers] for one in ran]) for step in steps)
                lines.append(f"| {arm} | {title} | {shown} |")
    return "\n".join(lines)


def at_step(values: list[list[float]]) -> str:
    """Of each seed's layers the mean; of these the mean and its standard error."""
    mean, error = mean_and_error([sum(one) / len(one) for one in values])
    return f"{mean:.2f} ± {error:.2f}"


def draw(path: Path, cells: dict[tuple[str, int], grid.Cell]) -> None:
    """Heat maps, layers by steps, means over seeds: a column for each measure, a row for each arm. A CSV beside it."""
    import numpy as np
    from matplotlib.figure import Figure

    arms, seeds = list(dict.fromkeys(arm for arm, _ in cells)), sorted({seed for _, seed in cells})
    figure = Figure(figsize=(4 * len(MEASURES), 2 * len(arms)), layout="constrained")
    places = figure.subplots(len(arms), len(MEASURES), sharex=True, sharey=True, squeeze=False)
    for column, (name, (title, low, high)) in zip(places.T, MEASURES.items(), strict=True):
        for axes, arm in zip(column, arms, strict=True):
            mean_LS = np.mean([cells[arm, seed][name] for seed in seeds], axis=0).T
            edges = np.arange(mean_LS.shape[1] + 1) + 0.5, np.arange(mean_LS.shape[0] + 1) - 0.5
            mesh = axes.pcolormesh(*edges, mean_LS, vmin=low, vmax=high, rasterized=True)
        column[-1].set(xlabel="step", xscale="log")
        column[-1].set_xticks(ticks := [step for step in (1, 10, 100) if step <= mean_LS.shape[1]], map(str, ticks))
        figure.colorbar(mesh, ax=column.tolist(), location="top", aspect=30, shrink=0.9, label=title)
    for axes, arm in zip(places[:, 0], arms, strict=True):
        axes.set_ylabel(f"{arm}\nlayer")
    save(figure, path)
    fs.write_text(path.with_suffix(".csv"), as_csv(cells))


def as_csv(cells: dict[tuple[str, int], grid.Cell]) -> str:
    """The first steps, then ever fewer, by arm, seed and layer."""
    lines = ["arm,seed,step,layer," + ",".join(MEASURES)]
    for (arm, seed), one in cells.items():
        steps = one["entropy"]
        for step in (s for s in range(1, len(steps) + 1) if s < 10 or s % (10 if s < 100 else 50) == 0):
            for layer in range(len(steps[0])):
                values = ",".join(f"{one[name][step - 1][layer]:.3f}" for name in MEASURES)
                lines.append(f"{arm},{seed},{step},{layer},{values}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    asked = grid.arguments(__doc__, steps=400)
    cells = grid.fill(
        asked.out, asked.arms or list(ARMS), asked.seeds, lambda arm, seed: cell(arm, seed, asked.steps), print
    )
    if not asked.arms:
        late = {f"late {name}": ".3f" for name in MEASURES}
        print(by_step(cells) + "\n\n" + table(cells, {"loss": ".4f", **late}, "gain 1"))
        draw(asked.out / "zero-gain-load.png", cells)
