"""Which tokens should balance be counted over, and does it take a loss at all?

    python docs/lab/balance.py out/        # about 45 minutes on one core; resumes, and --arms/--seeds share the work

Sixteen experts, two a token, in each of three layers; a step is eight sequences in four micro-batches. No balance; the
auxiliary loss with f over each sequence, over each micro-batch or over the whole step, at three strengths; the bias
update at two rates. Held-out loss against MaxVio over everything held out (2408.15664, equation 4).
"""

from __future__ import annotations

from pathlib import Path

from sextant.axes.capacity import Experts
from sextant.axes.routing import Auxiliary, Bias, SoftmaxTopK
from sextant.lab import grid
from sextant.lab.pictures import numbers, save
from sextant.lab.trained import loads, mixture, paired, table, train
from sextant.train.run import Run

COEFFICIENTS = {"weak": 1e-3, "usual": 1e-2, "strong": 1e-1}
SCOPES = {"sequence": "sequence", "micro-batch": "micro_batch", "global batch": "global_batch"}
RATES = {"slow": 1e-3, "fast": 1e-2}

ARMS: dict[str, tuple] = (
    {"none": ()}
    | {
        f"{name} {strength}": (Auxiliary(coef=coef, scope=scope),)
        for strength, coef in COEFFICIENTS.items() for name, scope in SCOPES.items()
    }
    | {f"bias {speed}": (Bias(rate=rate),) for speed, rate in RATES.items()}
)


def run(balance: tuple, steps: int) -> Run:
    biased = any(isinstance(term, Bias) for term in balance)
    router = SoftmaxTopK(top_k=2, normalize=True, bias=biased)
    return mixture(Experts(experts=16, hidden=64, router=router, balance=balance), steps=steps, micro_rows=2)


def cell(arm: str, seed: int, steps: int) -> grid.Cell:
    done = train(run(ARMS[arm], steps), seed)
    held = loads(done)
    means = {name: sum(getattr(load, name) for load in held) / len(held) for name in ("max_vio", "entropy", "unused")}
    return {"loss": done.loss, **means, "vio of a step": done.late("max_vio"), "curve": done.curve()}


def look(arm: str) -> dict[str, str]:
    """A colour for each kind of balance, a marker for each strength."""
    kind, _, strength = arm.rpartition(" ")
    color = f"C{[*SCOPES, 'bias'].index(kind)}" if kind else "black"
    markers = {"weak": "v", "usual": "o", "strong": "^", "slow": "o", "fast": "^"}
    return {"color": color, "marker": markers.get(strength, "s")}


def draw(path: Path, cells: dict[tuple[str, int], grid.Cell]) -> None:
    """Held-out loss over MaxVio: a small point for each seed, a large one for the mean. A CSV beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5))
    axes = figure.add_subplot(xlabel="MaxVio over everything held out", ylabel="loss minus none, nats, same seed")
    arms, seeds = list(dict.fromkeys(arm for arm, _ in cells)), sorted({seed for _, seed in cells})
    for arm in arms:
        vios = [cells[arm, seed]["max_vio"] for seed in seeds]
        losses = [cells[arm, seed]["loss"] - cells["none", seed]["loss"] for seed in seeds]
        axes.scatter(vios, losses, s=12, alpha=0.5, **look(arm))
        mean, error = paired(cells, arm, "none")
        axes.errorbar(sum(vios) / len(vios), mean, yerr=error, markersize=8, linestyle="", label=arm, **look(arm))
    axes.set_xscale("log")
    axes.set_xticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)
    numbers(path.with_suffix(".csv"), cells, ("loss", "max_vio", "entropy", "unused", "vio of a step"))


if __name__ == "__main__":
    asked = grid.arguments(__doc__, steps=400)
    cells = grid.fill(
        asked.out, asked.arms or list(ARMS), asked.seeds, lambda arm, seed: cell(arm, seed, asked.steps), print
    )
    if not asked.arms:
        columns = {"loss": ".4f", "max_vio": ".2f", "vio of a step": ".2f", "entropy": ".3f", "unused": ".3f"}
        print(table(cells, columns, "none"))
        draw(asked.out / "balance.png", cells)
