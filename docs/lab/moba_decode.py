"""What does sparse decoding read under MHA, GQA and MQA? Distinct blocks per KV head, measured against chance.

    python docs/lab/moba_decode.py out/        # about 10 minutes on two cores; resumes

A four-layer MoBA model with eight query heads is trained on the books; then held-out text is read and the blocks that
the heads of one KV group choose are counted. Chance is ``N (1 - (1 - k/N)^G)`` (heads that choose apart and evenly).
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from sextant import recipes
from sextant.axes.attention import MoBA
from sextant.axes.capacity import Dense
from sextant.axes.kv import GQA
from sextant.data.loader import heldout
from sextant.lab import grid
from sextant.lab.pictures import bars
from sextant.lab.selection import look
from sextant.model.spec import ModelSpec, stack
from sextant.train.folder import RunFolder
from sextant.train.loop import Trainer
from sextant.train.run import Run

BLOCK, TOP_K, LENGTH, HEADS = 16, 4, 512, 8
ARMS = {"MHA": 8, "GQA, 4 heads a group": 2, "MQA": 1}


def plan(arm: str, seed: int, steps: int) -> Run:
    run = recipes.get("nano").twin()
    kv = GQA(heads=HEADS, kv_heads=ARMS[arm], head_dim=16)
    layers = stack(4, attention=MoBA(block=BLOCK, top_k=TOP_K), kv=kv, feed_forward=Dense(hidden=256))
    model = ModelSpec(name="moba", vocab=run.model.vocab, width=128, context=LENGTH, layers=layers, init=run.model.init)
    return run.replace(
        model=model, steps=steps, seed=seed, data=run.data.replace(seq_len=LENGTH, seed=seed), compile=False
    )


def measure(arm: str, seed: int, out: Path, steps: int) -> grid.Cell:
    """Train, then count what the queries of held-out text read, meaned over layers."""
    with RunFolder(out / f"{arm.split(',')[0]}-seed{seed}") as folder:
        trainer = Trainer(plan(arm, seed, steps), folder, "cpu", lambda line: None)
        bpb = trainer.fit().bpb
        found = []
        for batch in islice(heldout(trainer.heldout_shards, LENGTH, 4), 4):
            found += look(trainer.model.eval(), batch.tokens_T, batch.stream)[0]
    mean = {
        name: sum(getattr(choice, name) for choice in found) / len(found)
        for name in ("read", "union", "union_by_chance")
    }
    return {"bpb": bpb, "queries": sum(choice.queries for choice in found), **mean}


def table(cells: dict[tuple[str, int], grid.Cell]) -> None:
    """Means over seeds; reads against a dense step of the same length."""
    print(
        "\n| sharing | heads a group | blocks a head reads | distinct per KV head | by chance | most | share of past |"
    )
    print("|---" * 7 + "|")
    for arm, groups in ARMS.items():
        mine = [cell for (name, _), cell in cells.items() if name == arm]
        read, union, chance = (sum(c[key] for c in mine) / len(mine) for key in ("read", "union", "union_by_chance"))
        group, past = HEADS // groups, LENGTH / BLOCK / 2
        print(
            f"| {arm} | {group} | {read:.2f} | {union:.2f} | {chance:.2f} | {group * read:.1f} | {union / past:.0%} |"
        )


if __name__ == "__main__":
    asked = grid.arguments(__doc__, steps=200)
    cells = grid.fill(
        asked.out,
        asked.arms or list(ARMS),
        asked.seeds,
        lambda arm, seed: measure(arm, seed, asked.out, asked.steps),
        print,
    )
    if not asked.arms:
        table(cells)
        names = {"read": "a head reads", "union": "distinct, per KV head", "union_by_chance": "by chance"}
        title = "What a decoding step reads"
        bars(asked.out / "moba-decode.png", cells, names, ylabel="blocks per query", title=title)
