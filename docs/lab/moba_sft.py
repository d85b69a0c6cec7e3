"""Why does sparse attention learn slowly when few tokens carry loss, and do full last layers repair it?

    python docs/lab/moba_sft.py out/        # about 15 minutes on one core; resumes

First the gradient's evenness over the prompt, by depth, when 10 of 1,024 tokens carry loss (six layers, fresh weights).
Then fine-tuning: a model that has learnt the phone book with full attention is taught another habit (every number is to
be told plus one), with all, a quarter or a sixteenth of the answers scored, under full attention, MoBA, and MoBA with
its last layer full; the same weights and rows for all.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from sextant.axes.attention import Full, MoBA
from sextant.axes.capacity import Dense
from sextant.axes.kv import GQA
from sextant.axes.stability import NormalInit, RMSNorm
from sextant.core.spec import Spec
from sextant.core.stream import Stream
from sextant.kernels.loss import IGNORE
from sextant.lab import grid
from sextant.lab.pictures import curves
from sextant.lab.recall import PhoneBook, learn
from sextant.lab.selection import participation
from sextant.model.spec import ModelSpec, stack
from sextant.model.switch import attending, switch
from sextant.model.transformer import Transformer

DEEP, SHALLOW = 6, 2
PATTERNS = {
    "full": (Full(), Full()),
    "moba": (MoBA(block=16, top_k=2),) * 2,
    "moba, last full": (MoBA(block=16, top_k=2), Full()),
}
"""Pattern of all layers but the last, and of the last."""
BASE = (PhoneBook(pairs=4, book=8, gap=0), PhoneBook(pairs=8, book=16, gap=16), PhoneBook(pairs=16, book=32, gap=32))
SCORED = {"100 %": 16, "25 %": 4, "6 %": 1}
ARMS = [f"{pattern} {share}" for share in SCORED for pattern in PATTERNS]


def depth(patterns: tuple[Spec, Spec], layers: int) -> list[Spec]:
    return [patterns[0]] * (layers - 1) + [patterns[1]]


def evenness(patterns: tuple[Spec, Spec], seed: int) -> list[float]:
    """Participation ratio at the input of every layer, fresh weights, T = 1,024, loss on 10 tokens at the end."""
    blocks = tuple(p.replace(block=32) if isinstance(p, MoBA) else p for p in patterns)
    layers = stack(
        DEEP, attention=depth(blocks, DEEP), kv=GQA(heads=4, kv_heads=2, head_dim=32), feed_forward=Dense(hidden=256)
    )
    model = ModelSpec(name="deep", vocab=256, width=128, context=1024, layers=layers, init=NormalInit(std=0.05)).build(
        seed=seed
    )
    tokens_T = torch.randint(256, (1024,), generator=torch.Generator().manual_seed(seed))
    targets_T = torch.full((1024,), IGNORE)
    targets_T[-10:] = tokens_T[:10]
    return participation(model, tokens_T, targets_T, Stream.of_lengths([1024]))


def small(patterns: tuple[Spec, Spec]) -> ModelSpec:
    kv = GQA(heads=2, kv_heads=2, head_dim=32, qk_norm=RMSNorm())
    layers = stack(SHALLOW, attention=depth(patterns, SHALLOW), kv=kv, feed_forward=Dense(hidden=128))
    return ModelSpec(
        name="small", vocab=BASE[0].vocab, width=64, context=1024, layers=layers, init=NormalInit(std=0.05)
    )


@cache
def base(seed: int) -> dict[str, torch.Tensor]:
    """Weights that know the phone book, learnt with full attention."""
    model = small(PATTERNS["full"]).build(seed=seed)
    curve = learn(model, BASE, 1500, seed, enough=0.99)
    print(f"base, seed {seed}: {curve[-1][2]:.2f} right", flush=True)
    return {name: value.clone() for name, value in model.state_dict().items()}


def tuned(arm: str, seed: int, steps: int) -> grid.Cell:
    pattern, _, share = arm.rpartition(" %")[0].rpartition(" ")
    model: Transformer = small(PATTERNS["full"]).build(seed=seed)
    model.load_state_dict(base(seed))
    switch(model, attending(model.spec, depth(PATTERNS[pattern], SHALLOW)))
    task = PhoneBook(pairs=16, book=32, gap=32, shift=1, scored=SCORED[f"{share} %"])
    return {"curve": learn(model, [task], steps, seed + 100, rate=1e-3, every=5)}


def report(cells: dict[tuple[str, int], grid.Cell], out: Path) -> None:
    """Mean loss over fine-tuning, by share of scored answers, and the gap to full attention."""
    seeds = sorted({seed for _, seed in cells})
    print("\n| answers scored | " + " | ".join(PATTERNS) + " | gap of moba | gap with last full |\n" + "|---" * 6 + "|")
    for share in SCORED:
        means = {}
        for pattern in PATTERNS:
            losses = [point[1] for seed in seeds for point in cells[f"{pattern} {share}", seed]["curve"]]
            means[pattern] = sum(losses) / len(losses)
        full, moba, repaired = means.values()
        print(f"| {share} | {full:.3f} | {moba:.3f} | {repaired:.3f} | {moba - full:+.3f} | {repaired - full:+.3f} |")
    few = {key: cell for key, cell in cells.items() if key[0].endswith(" 6 %")}
    curves(out / "moba-sft.png", few, ylabel="loss", title="Fine-tuning with one answer in sixteen scored")


if __name__ == "__main__":
    asked = grid.arguments(__doc__, steps=150)
    print("| pattern | " + " | ".join(f"input of layer {i}" for i in range(DEEP)) + " |\n" + "|---" * (DEEP + 1) + "|")
    three = MoBA(block=32, top_k=3)
    for name, patterns in {
        "full": PATTERNS["full"],
        "moba, top 3": (three, three),
        "moba, top 2": PATTERNS["moba"],
        "moba, top 2, last full": PATTERNS["moba, last full"],
    }.items():
        ratios = torch.tensor([evenness(patterns, seed) for seed in range(3)]).mean(0)
        print(f"| {name} | " + " | ".join(f"{ratio:.3f}" for ratio in ratios.tolist()) + " |", flush=True)
    cells = grid.fill(
        asked.out, asked.arms or ARMS, asked.seeds, lambda arm, seed: tuned(arm, seed, asked.steps), print
    )
    if not asked.arms:
        report(cells, asked.out)
