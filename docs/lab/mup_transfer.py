"""Does the best learning rate of a narrow model hold for a wide one? muP against one rate for all, widths 64 to 512.

    python docs/lab/mup_transfer.py out/ --workers 13       # about 7 minutes on 13 cores; resumes

Two layers on bytes of the bundled books, 100 steps of 1,024 bytes; both start alike at width 64 (N(0, 1/D)), but for
muP's head, which starts at 0. Every cell is one width at one rate (a factor of sqrt 2 apart under muP, 2 without).
"""

from __future__ import annotations

import math
import multiprocessing
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from sextant.axes.capacity import Dense
from sextant.axes.kv import GQA
from sextant.axes.stability import AnyInit, MuPInit, NormalInit
from sextant.core import fs
from sextant.core.errors import UsageError
from sextant.core.stream import Stream
from sextant.data.corpus import Corpus
from sextant.kernels.loss import summed_loss
from sextant.lab import grid
from sextant.lab.optimum import best
from sextant.model.spec import ModelSpec, stack
from sextant.model.transformer import Transformer
from sextant.train.optim import AdamW, Decay

WIDTHS = (64, 128, 256, 512)
BASE, HEAD_DIM, ROWS, LENGTH, HELD_ROWS = 64, 32, 8, 128, 64
RATES = {"mup": [-8 + i / 2 for i in range(7)], "standard": [-10.0 + i for i in range(6)]}
"""Exponents of the rates, by parametrisation."""


def starts(kind: str, width: int) -> AnyInit:
    if kind == "mup":
        return MuPInit(base_width=BASE, std=BASE**-0.5, head_std=0.0)
    return NormalInit(std=width**-0.5)


def sized(kind: str, width: int) -> ModelSpec:
    heads = width // HEAD_DIM
    kv = GQA(heads=heads, kv_heads=heads, head_dim=HEAD_DIM)
    layers = stack(2, kv=kv, feed_forward=Dense(hidden=2 * width))
    init = starts(kind, width)
    return ModelSpec(
        name=f"{kind}-{width}", vocab=256, width=width, context=LENGTH, layers=layers, init=init,
        embedding_scale=1 / init.std,  # rows of unit variance, or branches drown them
    )


@cache
def rows() -> Tensor:
    """The books as uint8 ``[N, LENGTH + 1]``, shuffled once for all."""
    with resources.as_file(resources.files("sextant.data") / "books.jsonl.gz") as path:
        text = "".join(document.text for document in Corpus([path])).encode()
    bytes_N = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    whole = bytes_N[: len(bytes_N) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    return whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))]


def loss_of(model: Transformer, rows_BT: Tensor) -> Tensor:
    """Mean nats per byte."""
    tokens, targets = rows_BT[:, :-1].long().flatten(), rows_BT[:, 1:].long().flatten()
    out = model(tokens, Stream.of_lengths([LENGTH] * len(rows_BT)))
    return summed_loss(out.hidden_TD, model.head_PD, targets) / len(targets)


def trained(arm: str, seed: int, steps: int) -> grid.Cell:
    """Loss on held-out rows after a short training: warm-up over a tenth of the steps, then straight down to 0."""
    kind, width, exponent = arm.split()
    model = sized(kind, int(width)).build(seed=seed)
    optimiser = AdamW(lr=2.0 ** float(exponent), decay=Decay(default=0.0)).build(model)
    held, order = rows()[:HELD_ROWS], torch.Generator().manual_seed(seed)
    for step in range(steps):
        drawn = torch.randint(HELD_ROWS, len(rows()), (ROWS,), generator=order)
        loss = loss_of(model, rows()[drawn])
        if not torch.isfinite(loss):
            return {"loss": math.inf}
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step(min(10 * (step + 1) / steps, (1 - step / steps) / 0.9))
    with torch.no_grad():
        return {"loss": float(loss_of(model, held))}


def arms(only: Iterable[str] = ()) -> list[str]:
    """``KIND WIDTH EXPONENT`` of every cell, the wide ones first; ``only`` keeps those with these first words."""
    every = [f"{kind} {width} {rate:g}" for width in WIDTHS[::-1] for kind in RATES for rate in RATES[kind]]
    return [arm for arm in every if not only or any(f"{arm} ".startswith(f"{words} ") for words in only)]


def cell(out: Path, steps: int, arm: str, seed: int) -> None:
    grid.fill(out, [arm], [seed], partial(trained, steps=steps), partial(print, flush=True))


def report(out: Path, seeds: list[int], steps: int) -> None:
    """Best rate by width and parametrisation, of the mean over seeds and of each; the picture and its numbers."""
    cells = grid.fill(out, arms(), seeds, partial(trained, steps=steps), print)
    lines = [f"{arm.replace(' ', ',')},{seed},{cell['loss']}" for (arm, seed), cell in cells.items()]
    fs.write_text(out / "mup-transfer.csv", "\n".join(["kind,width,log2_rate,seed,loss", *lines]) + "\n")
    curves = {}
    print("| | width | best rate | by seed | lowest loss | best over the narrowest's |\n" + "|---" * 6 + "|")
    for kind, rates in RATES.items():
        for width in WIDTHS:
            each = [{x: cells[f"{kind} {width} {x:g}", seed]["loss"] for x in rates} for seed in seeds]
            mean = curves[kind, width] = {x: sum(losses[x] for losses in each) / len(each) for x in rates}
            at, by_seed = lowest(mean), ", ".join(f"{2 ** lowest(losses):.2g}" for losses in each)
            moved = 2 ** (at - lowest(curves[kind, WIDTHS[0]]))
            print(f"| {kind} | {width} | {2**at:.2g} | {by_seed} | {min(mean.values()):.3f} | {moved:.2f} |")
    draw(out / "mup-transfer.png", curves)


def lowest(losses: dict[float, float]) -> float:
    """The best exponent; NaN where the grid ends before it."""
    try:
        return best(losses)
    except UsageError:
        return math.nan


def draw(path: Path, curves: dict[tuple[str, int], dict[float, float]]) -> None:
    """Loss over rate, one colour per width, a cross at each best."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4))
    for place, kind in enumerate(RATES):
        axes = figure.add_subplot(1, 2, place + 1, xlabel="rate", ylabel="held-out nats per byte", title=kind)
        axes.set_xscale("log", base=2)
        for index, width in enumerate(WIDTHS):
            losses = {x: y for x, y in curves[kind, width].items() if math.isfinite(y)}
            axes.plot([2**x for x in losses], list(losses.values()), f"C{index}.-", linewidth=1, label=f"width {width}")
            if math.isfinite(at := lowest(losses)):
                axes.plot([2**at], [min(losses.values())], f"C{index}x", markersize=10)
        axes.set_ylim(top=min(min(c.values()) for c in curves.values()) + 1.2)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def asked() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--arms", nargs="+", default=[], help="only these, such as 'mup 64' 'standard 512 -8'")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    return parser.parse_args()


if __name__ == "__main__":
    ask = asked()
    todo = [(arm, seed) for arm in arms(ask.arms) for seed in ask.seeds]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(ask.workers, context, torch.set_num_threads, (1,)) as pool:
        list(pool.map(partial(cell, ask.out, ask.steps), *zip(*todo, strict=True)))
    if not ask.arms:
        report(ask.out, ask.seeds, ask.steps)
