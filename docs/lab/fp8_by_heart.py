"""Which part of an FP8 recipe slows learning by heart?

    python docs/lab/fp8_by_heart.py out/        # about 40 minutes on one core; resumes, --arms/--seeds share the work

On an H100 delayed scaling fell behind bf16 on training text alone, once that text was known. Here the model of
``fp8_quality.py`` learns rows of the bundled books, or rows of random tokens, of which nothing but heart can be learnt;
FP8 is emulated. One part of delayed scaling after another is put back to bf16, given E4M3, or given a shorter memory.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sextant.axes.capacity import Experts
from sextant.axes.numerics import BF16, FP8Blocks, FP8Delayed, Numerics
from sextant.axes.routing import SoftmaxTopK
from sextant.core.stream import Stream
from sextant.data.loader import Loader
from sextant.data.prepare import opened
from sextant.data.spec import Data
from sextant.kernels.loss import IGNORE, summed_loss
from sextant.lab import grid
from sextant.lab.pictures import gaps, numbers
from sextant.lab.trained import mixture, table

POLICIES: dict[str, Numerics] = {
    "bf16": BF16(),
    "delayed": FP8Delayed(),
    "delayed 16 steps": FP8Delayed(history=16),
    "delayed bf16 forward": FP8Delayed(forward="bf16"),
    "delayed bf16 gradient": FP8Delayed(data_gradient="bf16"),
    "delayed E4M3 gradient": FP8Delayed(data_gradient="e4m3"),
    "blocks": FP8Blocks(),
}
ROWS, LENGTH, BATCHES = 16, 64, 24
"""A step learns sixteen rows; the same 24 steps come round again and again."""


def random_rows(vocab: int, seed: int) -> Tensor:
    """int64 ``[24, T]``, tokens that say nothing of each other."""
    return torch.randint(vocab, (BATCHES, ROWS * LENGTH), generator=torch.Generator().manual_seed(seed))


def book_rows(vocab: int, seed: int) -> Tensor:
    """The same of rows that a run with this seed would begin with."""
    data = Data(vocab=vocab, seq_len=LENGTH, seed=seed)
    return Loader(opened(data)[0], data).take(BATCHES * ROWS).tokens_T.view(BATCHES, ROWS * LENGTH)


SOURCES = {"books": book_rows, "random": random_rows}
ARMS = {f"{source} {policy}": (source, policy) for source in SOURCES for policy in POLICIES}


def cell(arm: str, seed: int, steps: int) -> grid.Cell:
    """Training loss of every pass, and of the last one."""
    source, policy = ARMS[arm]
    numerics = POLICIES[policy]
    experts = Experts(experts=8, hidden=128, router=SoftmaxTopK(top_k=2, normalize=True))
    spec = mixture(experts, layers=4, width=128).model
    model = spec.build(numerics, seed=seed).train()
    tokens_NT = SOURCES[source](spec.vocab, seed)
    targets_NT = tokens_NT.roll(-1, dims=1)
    targets_NT[:, LENGTH - 1 :: LENGTH] = IGNORE
    stream, count = Stream.of_lengths([LENGTH] * ROWS), ROWS * (LENGTH - 1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    losses, curve = [], []
    for step in range(1, steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 20) * (1 - 0.9 * step / steps)
        at = step % BATCHES
        hidden_TD = model(tokens_NT[at], stream).hidden_TD
        loss = summed_loss(hidden_TD, model.head_PD, targets_NT[at]) / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        numerics.after_step(model)
        losses.append(loss.item())
        if step % BATCHES == 0:
            curve.append((step, sum(losses[-BATCHES:]) / BATCHES))
    return {"curve": curve, "loss": curve[-1][1]}


def draw(path: Path, cells: dict[tuple[str, int], grid.Cell]) -> None:
    """Differences from bf16 on the same rows, a dot per seed."""
    seeds = sorted({seed for _, seed in cells})
    apart = {
        source: {
            f"{source} {policy}": [
                cells[f"{source} {policy}", seed]["loss"] - cells[f"{source} bf16", seed]["loss"] for seed in seeds
            ]
            for policy in POLICIES if policy != "bf16"
        }
        for source in SOURCES
    }
    gaps(path, apart, xlabel="training loss of the last pass minus bf16's", title="Rows learnt by heart")
    numbers(path.with_suffix(".csv"), cells, ["loss"])


if __name__ == "__main__":
    asked = grid.arguments(__doc__, steps=312)
    cells = grid.fill(
        asked.out, asked.arms or list(ARMS), asked.seeds, lambda arm, seed: cell(arm, seed, asked.steps), print
    )
    if not asked.arms:
        for source in SOURCES:
            own = {place: found for place, found in cells.items() if ARMS[place[0]][0] == source}
            print(table(own, {"loss": ".4f"}, f"{source} bf16"))
        draw(asked.out / "fp8-by-heart.png", cells)
