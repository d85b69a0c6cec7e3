"""Which mixers find a far needle? The phone book with a gap that windows cannot bridge, same width, steps and rows.

    python docs/lab/needle.py out/        # about an hour on two cores; resumes, and --arms/--seeds share the work

Two layers each, because deeper ones stay with a shortcut (guess among the numbers not yet told) for longer than these
budgets: full, window, MoBA, NSA, lightning, and lightning below full. The last two are then grown to eight layers, by
six lightning layers that start as the identity, and trained on: so "lightning" and "hybrid 7:1". A model that has
not reached the last lesson when its steps are over begins again from other weights, whatever its arm.
"""

from __future__ import annotations

import torch

from sextant.axes.attention import NSA, Full, Lightning, MoBA, Window
from sextant.axes.attention.nsa import MLPPhi
from sextant.axes.capacity import Dense
from sextant.axes.kv import GQA
from sextant.axes.stability import Linear, NormalInit, RMSNorm, Role
from sextant.core.spec import Spec
from sextant.lab import grid
from sextant.lab.pictures import curves
from sextant.lab.recall import PhoneBook, learn
from sextant.model.spec import Layer, ModelSpec
from sextant.model.transformer import Transformer

WIDTH, HEADS, DEEP = 64, 2, 8
STARTS = 4
"""How often a model may begin."""
LESSONS = tuple(PhoneBook(pairs=n, book=2 * n, gap=gap) for n, gap in ((4, 0), (8, 16), (16, 32), (16, 96)))
"""Easy rows first; the last is the needle."""


LIGHTNING = Lightning(heads=8, head_dim=8)
ARMS: dict[str, list[Spec]] = {
    "full": [Full()] * 2,
    "moba": [MoBA(block=8, top_k=4)] * 2,
    "nsa": [NSA(block=8, length=4, stride=2, top_k=5, initial=1, local=1, window=16, phi=MLPPhi(hidden=32))] * 2,
    "hybrid 7:1": [LIGHTNING, Full()],
    "lightning": [LIGHTNING] * 2,
    "window": [Window(window=8)] * 2,
}
GROWN = ("hybrid 7:1", "lightning")


def spec(attention: list[Spec]) -> ModelSpec:
    """A model with these mixers."""
    kv, ff = GQA(heads=HEADS, kv_heads=HEADS, head_dim=WIDTH // HEADS, qk_norm=RMSNorm()), Dense(hidden=2 * WIDTH)
    layers = [
        Layer.parse({"attention": one, "kv": None if isinstance(one, Lightning) else kv, "feed_forward": ff})
        for one in attention
    ]
    return ModelSpec(
        name="needle", vocab=LESSONS[0].vocab, width=WIDTH, context=512, layers=tuple(layers), init=NormalInit(std=0.05)
    )


def grown(small: Transformer, seed: int) -> Transformer:
    """Eight layers that compute what two did: six lightning layers between them add nothing yet."""
    first, last = (layer.attention for layer in small.spec.layers)
    deep = spec([first, *[LIGHTNING] * (DEEP - 2), last]).build(seed=seed + 1)
    weights = {name.replace("blocks.1.", f"blocks.{DEEP - 1}."): value for name, value in small.state_dict().items()}
    deep.load_state_dict({**deep.state_dict(), **weights})
    with torch.no_grad():
        for block in list(deep.blocks)[1:-1]:
            for branch in (block.attention, block.feed_forward):
                for module in branch.modules():
                    if isinstance(module, Linear) and module.role in (Role.ATTENTION_OUT, Role.FF_OUT):
                        module.weight.zero_()
    return deep


def run(arm: str, seed: int, steps: int) -> grid.Cell:
    """Learn, from as many starts as it takes; a grown arm goes on for a hundred steps."""
    for start in range(1, STARTS + 1):
        draw = seed + 100 * (start - 1)
        model = spec(ARMS[arm]).build(seed=draw)
        curve = learn(model, LESSONS, steps, draw, say=print, enough=0.99)
        ended, _, right = curve[-1]
        if right > 0:
            break
    if arm in GROWN:
        model = grown(model, seed)
        more = learn(model, LESSONS[-1:], 100, seed + 1000, rate=1e-3, say=print)
        curve += [(ended + step, loss, right) for step, loss, right in more]
    return {"params": sum(p.numel() for p in model.parameters()), "starts": start, "curve": curve}


def table(cells: dict[tuple[str, int], grid.Cell]) -> None:
    """Share of right answers over the last twenty steps; and how many starts it took, where more than one."""
    seeds = sorted({seed for _, seed in cells})
    print(
        "\n| arm | parameters | "
        + " | ".join(f"right, seed {seed}" for seed in seeds)
        + " |\n"
        + "|---" * (len(seeds) + 2)
        + "|"
    )
    for arm in ARMS:
        ends = [(cells[arm, seed]["curve"][-1][2], cells[arm, seed]["starts"]) for seed in seeds]
        shown = " | ".join(f"{right:.3f}" + (f", start {start}" if start > 1 else "") for right, start in ends)
        print(f"| {arm} | {cells[arm, seeds[0]]['params']:,} | {shown} |")


if __name__ == "__main__":
    asked = grid.arguments(__doc__, steps=1500)
    cells = grid.fill(
        asked.out, asked.arms or list(ARMS), asked.seeds, lambda arm, seed: run(arm, seed, asked.steps), print
    )
    if not asked.arms:
        table(cells)
        curves(asked.out / "needle.png", cells, ylabel="share of right answers", title="A far needle", column=2)
