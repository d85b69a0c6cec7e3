"""Can a capacity limit turn the ranking of two designs around?

    python docs/lab/drops.py out/        # about 15 minutes on one core; resumes, and --arms/--seeds share the work

A router left free against one held balanced by a strong loss. Both are trained dropless, and with a capacity factor of
1 that drops late copies. Held-out loss by the rule of training, and by the model's own rule of evaluation (no drops).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sextant.axes.capacity import Experts
from sextant.axes.capacity.experts import ExpertsModule
from sextant.axes.routing import Auxiliary, Capacity, Dropless, SoftmaxTopK
from sextant.lab import grid
from sextant.lab.pictures import curves
from sextant.lab.trained import mean_and_error, mixture, paired, train
from sextant.model.transformer import Transformer
from sextant.train.run import Run

VARIANTS = {"free": (), "balanced": (Auxiliary(coef=0.1, scope="sequence"),)}
RULES = {"dropless": Dropless(), "capacity": Capacity(factor=1.0)}
ARMS = [f"{variant} {rule}" for rule in RULES for variant in VARIANTS]


def run(arm: str, steps: int) -> Run:
    variant, rule = arm.split()
    router = SoftmaxTopK(top_k=2, normalize=True)
    experts = Experts(experts=16, hidden=64, router=router, balance=VARIANTS[variant], overflow=RULES[rule])
    return mixture(experts, steps=steps)


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


def report(cells: dict[tuple[str, int], grid.Cell]) -> str:
    """Markdown: variants by rule, and what being free is worth under each; below 0 the free router is better."""
    seeds = sorted({seed for _, seed in cells})
    names = {"ruled": "loss, rule of training", "loss": "loss, no drops", "drop_rate": "dropped", "max_vio": "MaxVio"}
    lines = [f"| arm | {' | '.join(names.values())} |", "|---" * (len(names) + 1) + "|"]
    for arm in dict.fromkeys(arm for arm, _ in cells):
        shown = [mean_and_error([cells[arm, seed][name] for seed in seeds])[0] for name in names]
        lines.append(f"| {arm} | " + " | ".join(f"{value:.4f}" for value in shown) + " |")
    lines += ["\n| free minus balanced | rule of training | no drops |", "|---|---|---|"]
    for rule in RULES:
        gaps = [paired(cells, f"free {rule}", f"balanced {rule}", name) for name in ("ruled", "loss")]
        lines.append(f"| {rule} | " + " | ".join(f"{mean:+.4f} ± {error:.4f}" for mean, error in gaps) + " |")
    return "\n".join(lines)


def draw(path: Path, cells: dict[tuple[str, int], grid.Cell]) -> None:
    curves(path, cells, ylabel="training loss, nats", title="Free and balanced routers, with and without drops")


if __name__ == "__main__":
    asked = grid.arguments(__doc__, steps=300)
    cells = grid.fill(
        asked.out, asked.arms or ARMS, asked.seeds, lambda arm, seed: cell(arm, seed, asked.steps), print
    )
    if not asked.arms:
        print(report(cells))
        draw(asked.out / "drops.png", cells)
