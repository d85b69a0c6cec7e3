"""How should outputs of blocks be merged? By log-sum-exp, by plain addition, or by the gate's weights.

    python docs/lab/moba_merge.py out/        # about 5 minutes on two cores

First on random numbers with every block chosen, where full attention is the truth; then in training on the phone book
(``sextant.lab.recall``), from the same weights and on the same rows, three seeds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sextant.axes.attention import Full, MoBA
from sextant.axes.attention.base import Attention
from sextant.axes.capacity import Dense
from sextant.axes.kv import GQA
from sextant.axes.stability import NormalInit, RMSNorm
from sextant.kernels.attention import Scores, attend_dense
from sextant.lab import grid
from sextant.lab.pictures import curves
from sextant.lab.recall import PhoneBook, learn
from sextant.model.spec import ModelSpec, stack
from sextant.model.transformer import Transformer

BLOCK, TASK = 8, PhoneBook(pairs=8, book=16, gap=48)
ARMS = ("full", "log-sum-exp", "sum", "gate")


def merged(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, scale: float, how: str) -> Tensor:
    """Every block attended apart, causally, then merged: ``o_BTHV``. Rows are whole blocks."""
    length = q_BTHK.shape[1]
    scores = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK) * scale
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    blocks = scores.masked_fill(hidden, -torch.inf).unflatten(-1, (-1, BLOCK))
    lse = blocks.logsumexp(-1)
    apart = torch.exp(blocks - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    means = k_BTHK.unflatten(1, (-1, BLOCK)).mean(2)
    gate = torch.einsum("bthk,bmhk->bhtm", q_BTHK, means).masked_fill(lse == -torch.inf, -torch.inf)
    share = {"log-sum-exp": lse.softmax(-1), "gate": gate.softmax(-1), "sum": torch.ones_like(lse)}[how]
    return torch.einsum("bhts,bshv->bthv", (apart * share[..., None]).flatten(-2), v_BTHV)


class Merged(Attention):
    """All blocks of rows of one length, in MoBA's place; for training only."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how

    def forward(self, heads, x_TD, stream, scores, state):
        rows = (x.unflatten(0, (stream.rows, -1)) for x in (heads.q_THK, heads.k_TGK, heads.v_TGV))
        return merged(*rows, scores.scale, self.how).flatten(0, 1), None


def on_random_numbers() -> list[list[str]]:
    """Every block chosen, 10 blocks: size of the output and distance from full attention."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 10 * BLOCK, 4, 16, dtype=torch.float64) for _ in range(3))
    causal_TS = torch.ones(10 * BLOCK, 10 * BLOCK, dtype=torch.bool).tril()
    full_THV, _ = attend_dense(q[0], k[0], v[0], causal_TS, Scores(0.25))
    late = slice(9 * BLOCK, None)
    rows = []
    for how in ARMS[1:]:
        o_THV = merged(q, k, v, 0.25, how)[0]
        size = (o_THV[late].square().mean() / full_THV[late].square().mean()).sqrt()
        rows.append([how, f"{(o_THV - full_THV).abs().max():.1e}", f"{size:.2f}"])
    return rows


def model(arm: str, seed: int) -> Transformer:
    """Two layers on the phone book; every arm starts from the same weights."""
    attention = Full() if arm == "full" else MoBA(block=BLOCK, top_k=TASK.length // BLOCK)
    layers = stack(
        2,
        attention=attention,
        kv=GQA(heads=2, kv_heads=2, head_dim=32, qk_norm=RMSNorm()),
        feed_forward=Dense(hidden=128),
    )
    spec = ModelSpec(name=arm, vocab=TASK.vocab, width=64, context=512, layers=layers, init=NormalInit(std=0.05))
    built = spec.build(seed=seed)
    if arm in ("sum", "gate"):
        for block in built.blocks:
            block.attention.pattern = Merged(arm)
    return built


def table(cells: dict[tuple[str, int], grid.Cell]) -> None:
    """Last losses, and how far all blocks by log-sum-exp stray from full attention while training."""
    seeds = sorted({seed for _, seed in cells})
    print(
        "\n| merge | "
        + " | ".join(f"seed {seed}: loss, right" for seed in seeds)
        + " |\n"
        + "|---" * (len(seeds) + 1)
        + "|"
    )
    for arm in ARMS:
        last = [cells[arm, seed]["curve"][-1] for seed in seeds]
        print(f"| {arm} | " + " | ".join(f"{loss:.3f}, {right:.2f}" for _, loss, right in last) + " |")
    for steps in (50, 1000):
        apart = max(
            abs(a[1] - b[1])
            for seed in seeds
            for a, b in zip(cells["full", seed]["curve"], cells["log-sum-exp", seed]["curve"], strict=True)
            if a[0] <= steps
        )
        print(f"full and log-sum-exp over all blocks, up to step {steps}: losses at most {apart:.1e} apart")


if __name__ == "__main__":
    asked = grid.arguments(__doc__, steps=400)
    print("| merge | largest difference from full | rms of late outputs / full's |\n|---|---|---|")
    for row in on_random_numbers():
        print("| " + " | ".join(row) + " |")

    def run(arm: str, seed: int) -> grid.Cell:
        return {"curve": learn(model(arm, seed), [TASK], asked.steps, seed, rows=32, every=10)}

    cells = grid.fill(asked.out, asked.arms or ARMS, asked.seeds, run, print)
    if not asked.arms:
        table(cells)
        curves(asked.out / "moba-merge.png", cells, ylabel="loss of the answers", title="Merging the outputs of blocks")
