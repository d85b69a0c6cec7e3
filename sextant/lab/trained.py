"""One cell of an experiment as a run of the house's trainer, in a folder that is thrown away."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sextant.axes.attention import Full
from sextant.axes.capacity import Experts
from sextant.axes.kv import GQA, RoPE
from sextant.axes.numerics import FP32
from sextant.axes.numerics.base import is_training_state
from sextant.axes.stability import AnyResidual, NormalInit, PreNorm, RMSNorm
from sextant.data.loader import Batch, heldout
from sextant.data.spec import Data
from sextant.lab.grid import Cell
from sextant.model.spec import ModelSpec, stack
from sextant.model.transformer import Transformer
from sextant.train.balance import Load, Tally, alone
from sextant.train.evaluate import evaluate
from sextant.train.folder import RunFolder, records
from sextant.train.loop import Trainer
from sextant.train.optim import AdamW
from sextant.train.run import Batch as Rows
from sextant.train.run import Run
from sextant.train.schedule import Cosine


def mixture(
    experts: Experts, *, layers: int = 3, width: int = 64, steps: int = 250, micro_rows: int = 8,
    residual: AnyResidual | None = None, embedding_scale: float = 1.0,
) -> Run:
    """A small model in which every layer is this mixture, on the bundled books: 1,024 tokens a step."""
    kv = GQA(heads=width // 16, kv_heads=width // 32, head_dim=16, position=RoPE(), qk_norm=RMSNorm())
    model = ModelSpec(
        name="mixture", vocab=1024, width=width, context=128, init=NormalInit(std=0.05),
        embedding_scale=embedding_scale,
        layers=stack(layers, attention=Full(), kv=kv, feed_forward=experts, residual=residual or PreNorm()),
    )
    return Run(
        name="mixture", model=model, data=Data(vocab=1024, seq_len=128), optimiser=AdamW(lr=4e-3),
        schedule=Cosine(warmup=20), batch=Rows(rows=8, micro_rows=micro_rows), steps=steps,
    )


@dataclass(frozen=True)
class Trained:
    """A run that is over.

    Attributes:
        model: as trained.
        loss: nats per token over everything held out.
        metrics: what the trainer recorded, step by step.
    """

    trainer: Trainer
    loss: float
    metrics: list[dict[str, Any]]

    @property
    def model(self) -> Transformer:
        return self.trainer.model

    def curve(self, every: int = 10) -> list[list[float]]:
        """``[last step, mean training loss]`` of every few steps."""
        losses = [line["loss"] for line in self.metrics]
        pieces = [losses[at : at + every] for at in range(0, len(losses), every)]
        return [[at * every + len(piece), sum(piece) / len(piece)] for at, piece in enumerate(pieces)]

    def late(self, name: str, steps: int = 50) -> float:
        """Mean over layers and the last steps of a number of :class:`~sextant.train.balance.Load`."""
        values = [load[name] for line in self.metrics[-steps:] for load in line["load"].values()]
        return sum(values) / len(values)

    def heldout(self) -> Iterator[Batch]:
        """The batches of the held-out split."""
        run = self.trainer.run
        return heldout(self.trainer.heldout_shards, run.data.seq_len, run.batch.micro_rows)

    def loss_of(self, model: Transformer, tokens: int | None = None) -> float:
        """Held-out nats per token of a model, over so many tokens or all."""
        return evaluate(model, self.heldout(), self.trainer.bytes_P, tokens).loss


Around = Callable[[Transformer], AbstractContextManager[None]]


def train(run: Run, seed: int, around: Around = nullcontext) -> Trained:
    """Train with weights and data order of this seed, the fresh model inside ``around``."""
    rare = dict.fromkeys(("log_every", "eval_every", "sample_every", "save_every"), run.steps)
    seeded = run.replace(seed=seed, data=run.data.replace(seed=seed), **rare)
    with tempfile.TemporaryDirectory() as path, RunFolder(path) as folder:
        trainer = Trainer(seeded, folder, "cpu", lambda line: None)
        with around(trainer.model):
            result = trainer.fit()
        return Trained(trainer, result.loss, records(Path(path) / "metrics.jsonl"))


def exactly(model: Transformer) -> Transformer:
    """The same weights, everything in fp32."""
    exact = model.spec.build(FP32())
    exact.load_state_dict({name: x for name, x in model.state_dict().items() if not is_training_state(name)})
    return exact


@torch.no_grad()
def loads(trained: Trained) -> list[Load]:
    """Load of each layer's experts over everything held out, as chosen."""
    tallies = {layer: Tally() for layer in range(len(trained.model.blocks))}
    trained.model.eval()
    for batch in trained.heldout():
        for layer, routing in trained.model(batch.tokens_T, batch.stream).routings.items():
            tallies[layer].add(routing)
    return [tally.load(alone) for tally in tallies.values()]


@torch.no_grad()
def changed(trained: Trained, model: Transformer, reference: Transformer, tokens: int = 8192) -> list[float]:
    """By layer, the share of choices that two models make otherwise over the first held-out tokens."""
    other, seen = torch.zeros(len(model.blocks)), 0
    model.eval()
    reference.eval()
    for batch in trained.heldout():
        ours, theirs = (one(batch.tokens_T, batch.stream).routings for one in (model, reference))
        for layer, routing in ours.items():
            new_TA = (routing.experts_TA[..., None] != theirs[layer].experts_TA[:, None]).all(-1)
            other[layer] += new_TA.float().mean(-1).sum()
        seen += batch.tokens_T.numel()
        if seen >= tokens:
            break
    return (other / seen).tolist()


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error (NaN of a single value)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, float("nan")
    return mean, (sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)) ** 0.5


def paired(cells: dict[tuple[str, int], Cell], arm: str, base: str, name: str = "loss") -> tuple[float, float]:
    """Mean over seeds of the difference from another arm, and its standard error."""
    seeds = sorted({seed for _, seed in cells})
    return mean_and_error([cells[arm, seed][name] - cells[base, seed][name] for seed in seeds])


def table(cells: dict[tuple[str, int], Cell], columns: dict[str, str], base: str) -> str:
    """Markdown: every arm's means of the named numbers, and its paired difference of the first from ``base``.

    ``columns`` says how each number is written: ``{"loss": ".4f"}``.
    """
    arms, seeds = list(dict.fromkeys(arm for arm, _ in cells)), sorted({seed for _, seed in cells})
    first = next(iter(columns))
    lines = [f"| arm | {' | '.join(columns)} | {first} minus {base} |", "|---" * (len(columns) + 2) + "|"]
    for arm in arms:
        means = {name: sum(cells[arm, seed][name] for seed in seeds) / len(seeds) for name in columns}
        mean, error = paired(cells, arm, base, first)
        gap = "" if arm == base else f"{mean:+.4f} ± {error:.4f}"
        lines.append(f"| {arm} | {' | '.join(f'{means[n]:{form}}' for n, form in columns.items())} | {gap} |")
    return "\n".join(lines)
