"""Can a capacity limit turn the ranking of two designs around?

    python docs/lab/drops.py out/ --seeds 2 3 4 5 6 7     # about 45 minutes on one core; resumes, --arms share the work
    python docs/lab/drops.py out/ --seeds 8 9 10 11 12 13 --arms "free "{dropless,capacity} "slim "{dropless,capacity}

Eight sandwich-norm mixtures of equal active parameters (but two), each trained dropless and with a capacity factor of 1
that drops late copies. Held-out loss by the rule of training, and by the models' own rule of evaluation (no drops).
Looking at all pairs finds flips by chance, so from four seeds on the first half of them names the pairs and the others
judge them; of two variants, as in the second line, there is nothing to choose, and all seeds judge. Seeds 0 and 1
served to set sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path

from sextant.axes.capacity import Experts
from sextant.axes.capacity.experts import ExpertsModule
from sextant.axes.routing import Auxiliary, Capacity, Dropless, SoftmaxTopK
from sextant.axes.stability import SandwichNorm
from sextant.lab import grid
from sextant.lab.pictures import numbers, save
from sextant.lab.trained import mean_and_error, mixture, train
from sextant.model.transformer import Transformer
from sextant.train.run import Run

FREE = Experts(experts=16, hidden=64, router=SoftmaxTopK(top_k=2, normalize=True))
VARIANTS = {
    "free": FREE,
    "quiet": FREE,
    "light": FREE.replace(balance=(Auxiliary(coef=0.01, scope="micro_batch"),)),
    "even": FREE.replace(balance=(Auxiliary(coef=0.1, scope="sequence"),)),
    "fine": FREE.replace(experts=32, hidden=32, router=SoftmaxTopK(top_k=4, normalize=True)),
    "shared": FREE.replace(router=SoftmaxTopK(top_k=1), shared=64),
    "wide": FREE.replace(hidden=80),
    "wider": FREE.replace(hidden=96),
}
"""No balance; attention that starts at gain 0, which keeps load even for a while; two strengths of balance; smaller
experts; one that every token meets; a quarter as much again of every expert, and a half."""
LATER = {"slim": VARIANTS["light"].replace(hidden=32)}
"""Added when the grid had been seen, with seeds of its own: balanced experts of half the width. The lead that uneven
load gives "free" over "light" is small beside what drops take from it; half the width shifts both."""
RULES = {"dropless": Dropless(), "capacity": Capacity(factor=1.0)}
ARMS = [f"{variant} {rule}" for rule in RULES for variant in VARIANTS]


def run(arm: str, steps: int) -> Run:
    variant, rule = arm.split()
    residual = SandwichNorm(attention_gain=0.0 if variant == "quiet" else 1.0)
    experts = (VARIANTS | LATER)[variant].replace(overflow=RULES[rule])
    return mixture(experts, steps=steps, residual=residual, embedding_scale=20.0)


@contextmanager
def as_trained(model: Transformer) -> Iterator[None]:
    """Evaluation drops what training would drop."""
    layers = [module for module in model.modules() if isinstance(module, ExpertsModule)]
    specs = [layer.spec for layer in layers]
    for layer in layers:
        if isinstance(layer.spec.overflow, Capacity):
            overflow = layer.spec.overflow.replace(eval_factor=layer.spec.overflow.factor)
            layer.spec = layer.spec.replace(overflow=overflow)
    try:
        yield
    finally:
        for layer, spec in zip(layers, specs, strict=True):
            layer.spec = spec


def cell(arm: str, seed: int, steps: int) -> grid.Cell:
    done = train(run(arm, steps), seed)
    with as_trained(done.model):
        ruled = done.loss_of(done.model)
    late = {name: done.late(name) for name in ("drop_rate", "max_vio", "unused")}
    return {"loss": done.loss, "ruled": ruled, **late, "curve": done.curve()}


Cells = dict[tuple[str, int], grid.Cell]


def gap(cells: Cells, a: str, b: str, rule: str, seeds: Sequence[int]) -> tuple[float, float]:
    """Loss of ``a`` minus that of ``b`` by the rule of training, and its standard error; below 0, ``a`` is better."""
    return mean_and_error([cells[f"{a} {rule}", seed]["ruled"] - cells[f"{b} {rule}", seed]["ruled"] for seed in seeds])


def change(cells: Cells, variant: str, seed: int) -> float:
    """Loss with drops minus that without, each by its rule of training."""
    dropless, capacity = (cells[f"{variant} {rule}", seed]["ruled"] for rule in RULES)
    return capacity - dropless


def variants(cells: Cells) -> list[str]:
    """Those that were trained under every rule."""
    arms = {arm for arm, _ in cells}
    return [name for name in VARIANTS | LATER if all(f"{name} {rule}" in arms for rule in RULES)]


def flips(cells: Cells, seeds: Sequence[int]) -> list[tuple[str, str]]:
    """Pairs of which the first is better dropless and the second with drops, the surest first."""

    def sureness(pair: tuple[str, str]) -> float:
        (without, error), (dropping, other) = (gap(cells, *pair, rule, seeds) for rule in RULES)
        return min(-without / max(error, 1e-9), dropping / max(other, 1e-9))

    return sorted((pair for pair in permutations(variants(cells), 2) if sureness(pair) > 0), key=sureness, reverse=True)


def report(cells: Cells) -> str:
    """Markdown: losses of every arm, what drops cost each variant, then the pairs that flip."""
    seeds = sorted({seed for _, seed in cells})
    names = {"ruled": "loss, rule of training", "loss": "loss, no drops", "drop_rate": "dropped", "max_vio": "MaxVio"}
    lines = [f"| arm | {' | '.join(names.values())} |", "|---" * (len(names) + 1) + "|"]
    for arm in dict.fromkeys(arm for arm, _ in cells):
        shown = [mean_and_error([cells[arm, seed][name] for seed in seeds]) for name in names]
        lines.append(f"| {arm} | " + " | ".join(f"{mean:.4f} ± {error:.4f}" for mean, error in shown) + " |")
    lines += ["\n| variant | what drops cost, same seeds |", "|---|---|"]
    for name in variants(cells):
        mean, error = mean_and_error([change(cells, name, seed) for seed in seeds])
        lines.append(f"| {name} | {mean:+.4f} ± {error:.4f} |")
    half = len(seeds) // 2 if len(seeds) > 3 and len(variants(cells)) > 2 else len(seeds)
    lines += ["\n| pair | seeds | first minus second, dropless | with drops |", "|---" * 4 + "|"]
    for pair in flips(cells, seeds[:half])[:5]:
        for some in filter(None, (seeds[:half], seeds[half:])):
            gaps = [gap(cells, *pair, rule, some) for rule in RULES]
            shown = " | ".join(f"{mean:+.4f} ± {error:.4f}" for mean, error in gaps)
            lines.append(f"| {', '.join(pair)} | {' '.join(map(str, some))} | {shown} |")
    return "\n".join(lines)


def draw(path: Path, cells: Cells) -> None:
    """Loss by the rule of training, a line for each variant from dropless to drops: lines that cross are flips."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5))
    axes = figure.add_subplot(ylabel="held-out loss by the rule of training, nats", title="With and without drops")
    seeds = sorted({seed for _, seed in cells})
    for index, variant in enumerate(shown := variants(cells)):
        ends = [mean_and_error([cells[f"{variant} {rule}", seed]["ruled"] for seed in seeds]) for rule in RULES]
        means, errors = zip(*ends, strict=True)
        places = [end + 0.02 * (index - (len(shown) - 1) / 2) for end in range(len(RULES))]
        axes.errorbar(places, means, yerr=errors, marker="o", capsize=3, color=f"C{index}", label=variant)
    axes.set_xticks(range(len(RULES)), ["dropless", "capacity factor 1"])
    axes.set_xlim(-0.3, len(RULES) - 0.7)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)
    numbers(path.with_suffix(".csv"), cells, ("ruled", "loss", "drop_rate", "max_vio", "unused"))


if __name__ == "__main__":
    asked = grid.arguments(__doc__, steps=400)
    cells = grid.fill(
        asked.out, asked.arms or ARMS, asked.seeds, lambda arm, seed: cell(arm, seed, asked.steps), print
    )
    if variants(cells):
        print(report(cells))
        draw(asked.out / "drops.png", cells)
