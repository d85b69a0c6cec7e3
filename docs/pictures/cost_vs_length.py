"""The README's picture: what sequence length costs under each recipe's choices, from the budget formulas alone.

    python docs/pictures/cost_vs_length.py      # writes cost_vs_length.png and .csv beside this file
"""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

from sextant import recipes
from sextant.core.cost import At

HERE = Path(__file__).parent
NAMES = ("llama-3-8b", "mistral-7b", "mixtral-8x7b", "gemma-3-27b", "mai-base-1")
LENGTHS = [2**n for n in range(10, 21)]


def main() -> None:
    rows = []
    figure, (work, state) = plt.subplots(1, 2, figsize=(11, 4.2))
    for name in NAMES:
        model = recipes.get(name).paper().model
        costs = [model.cost(At(length)) for length in LENGTHS]
        short = costs[0].flops
        line = "o--" if name == "mixtral-8x7b" else "o-"  # its state equals that of llama-3-8b
        work.plot(LENGTHS, [cost.flops / short for cost in costs], line, markersize=3, label=name)
        state.plot(LENGTHS, [cost.state_bytes / 2**30 for cost in costs], line, markersize=3, label=name)
        rows += [(name, n, c.flops, c.state_bytes) for n, c in zip(LENGTHS, costs, strict=True)]
    work.set(title="Forward FLOPs per token, relative to 1 k", xscale="log", yscale="log", xlabel="sequence length")
    state.set(title="Decoding state per sequence, GiB (bf16)", xscale="log", yscale="log", xlabel="sequence length")
    for axes in (work, state):
        axes.grid(alpha=0.3)
        axes.set_xscale("log", base=2)
    work.legend()
    figure.tight_layout()
    figure.savefig(HERE / "cost_vs_length.png", dpi=110)
    with (HERE / "cost_vs_length.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("recipe", "tokens", "flops_per_token", "state_bytes"))
        writer.writerows(rows)


if __name__ == "__main__":
    main()
