"""What a recipe is: a published system as two functions, ``paper()`` at its size and ``twin()`` for two CPU cores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sextant.axes.numerics import BF16
from sextant.core.units import count
from sextant.data.spec import Data
from sextant.model.spec import ModelSpec
from sextant.train.optim import AdamW
from sextant.train.run import Batch, Run
from sextant.train.schedule import AnySchedule, Cosine


@dataclass(frozen=True)
class Recipe:
    """A named system.

    Attributes:
        name: as the paper names it, in lower case with dashes.
        line: what sets it apart.
        source: paper or report.
        paper: the run at published size; its data has to be brought (``data.source``).
        twin: the same choices, small enough to train in minutes on two CPU cores and the bundled books.
    """

    name: str
    line: str
    source: str
    paper: Callable[[], Run]
    twin: Callable[[], Run]


def paper_run(model: ModelSpec, seq_len: int, optimiser: AdamW, schedule: AnySchedule, batch: Batch, steps: int) -> Run:
    """A run at published size, in bf16, on data that the user prepares."""
    data = Data(source="data/pretraining", vocab=model.vocab, seq_len=seq_len)
    return Run(
        name=model.name, model=model, data=data, numerics=BF16(), optimiser=optimiser, schedule=schedule, batch=batch,
        steps=steps, save_every=1000, eval_every=1000, sample_every=1000, log_every=10,
    )


def published_only(model: ModelSpec) -> Run:
    """A run for a system whose weights, not training settings, were published: common settings stand in."""
    tokens_per_step, seq_len = 4 * 2**20, min(model.context, 8192)
    rows = tokens_per_step // seq_len
    steps = round(2e12 / tokens_per_step)
    return paper_run(
        model, seq_len, AdamW(lr=3e-4), Cosine(warmup=2000), Batch(rows=rows, micro_rows=1), steps
    )


def twin_run(model: ModelSpec, *, steps: int = 600, lr: float = 4e-3, lanes: int = 2) -> Run:
    """The CPU twin's run: the bundled books, 2,048 tokens a step, about two minutes for a million active parameters.

    One lane for each core, unless the model draws random numbers or has a capacity that a smaller micro-batch changes.
    """
    return Run(
        name=model.name, model=model, data=Data(vocab=model.vocab, seq_len=256), optimiser=AdamW(lr=lr),
        schedule=Cosine(warmup=30), batch=Batch(rows=8, micro_rows=8 // lanes, lanes=lanes), steps=steps, log_every=10,
        eval_every=200, sample_every=200, save_every=200,
    )


def size_line(model: ModelSpec) -> str:
    """``962.15 B, 34.66 B active``."""
    from sextant.core.cost import At

    cost = model.cost(At(model.context))
    return f"{count(cost.params)}, {count(cost.active_params)} active"
