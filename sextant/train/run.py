"""A run as one declaration: model, data, optimiser, schedule, batch, numerics, and how often to look and save."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from sextant.axes.attention import AnyAttention
from sextant.axes.numerics import FP32, AnyNumerics
from sextant.core.errors import UsageError
from sextant.core.spec import Spec
from sextant.data.spec import BOOKS, Data
from sextant.model.checks import check
from sextant.model.spec import ModelSpec
from sextant.model.switch import attending
from sextant.train.optim import AdamW, AnyOptimiser
from sextant.train.schedule import AnySchedule, Cosine

Positive = Annotated[int, Field(ge=1)]


class Batch(Spec):
    """Rows (sequences of ``data.seq_len`` tokens) per optimiser step, and how many go through the model at once.

    Attributes:
        micro_rows: rows of one micro-batch; gradients are summed over micro-batches.
        lanes: micro-batches side by side on a CPU, each with its share of the threads. They need the memory of as many
            micro-batches and change no gradient but by rounding. Where they cannot be told apart (the forward draws
            random numbers, or FP8 scales have a history), under a compiler and on a GPU they go one after another.
        ramp: (step, rows) pairs; before that step the batch has that many rows.
    """

    rows: int = Field(default=8, ge=1)
    micro_rows: int = Field(default=8, ge=1)
    lanes: int = Field(default=1, ge=1)
    ramp: tuple[tuple[Positive, Positive], ...] = ()

    @model_validator(mode="after")
    def _whole(self) -> Batch:
        for rows in (self.rows, *(rows for _, rows in self.ramp)):
            if rows % self.micro_rows:
                raise ValueError(f"micro_rows {self.micro_rows} must divide every batch size, here {rows}")
        if [step for step, _ in self.ramp] != sorted({step for step, _ in self.ramp}):
            raise ValueError("ramp steps must ascend")
        return self

    def at(self, step: int) -> int:
        """Rows of optimiser step ``step``."""
        return next((rows for until, rows in self.ramp if step < until), self.rows)


class Spikes(Spec):
    """Skip a step whose loss or gradient norm lies ``sigmas`` above the mean of the last ``window`` steps.

    Judged once half the window is full. ``patience`` skips in a row end the run with exit code 5.
    """

    window: int = Field(default=128, ge=4)
    sigmas: float = Field(default=6.0, gt=0)
    patience: int = Field(default=10, ge=1)


class Stage(Spec):
    """An earlier part of training in which layers read other keys than the model's own patterns say.

    Weights and optimiser state do not notice: only patterns without parameters change (spec sparse-attention 12.2).
    What is saved, served and converted is the model with its own patterns.

    Attributes:
        until: share of the steps at which it ends, for the next stage or the model's own patterns.
        attention: one pattern for each layer.
    """

    until: float = Field(gt=0, lt=1)
    attention: tuple[AnyAttention, ...]


class Run(Spec):
    """Everything that decides what a training run computes, and what it leaves behind."""

    schema_version: Literal[1] = 1
    name: str
    model: ModelSpec
    data: Data
    numerics: AnyNumerics = FP32()
    optimiser: AnyOptimiser = AdamW()
    schedule: AnySchedule = Cosine()
    batch: Batch = Batch()
    steps: int = Field(ge=1)
    clip: float | None = Field(default=1.0, gt=0)
    spikes: Spikes = Spikes()
    seed: int = Field(default=0, ge=0, lt=2**63)
    compile: bool | None = Field(default=None, description="torch.compile; None: on a GPU only")
    recompute: bool = Field(default=False, description="recompute blocks in backward")
    init_from: str | None = Field(default=None, description="run folder or checkpoint to take weights from")
    train_only: str | None = Field(default=None, description="pattern of parameter names; all others stay frozen")
    stages: tuple[Stage, ...] = Field(default=(), description="other attention early in training")
    log_every: int = Field(default=1, ge=1)
    eval_every: int = Field(default=100, ge=1)
    eval_tokens: int = Field(default=65_536, ge=1, description="held-out tokens per evaluation; the last uses all")
    sample_every: int = Field(default=100, ge=1)
    prompt: str = "The "
    save_every: int = Field(default=100, ge=1)
    keep: int = Field(default=2, ge=2, description="newest checkpoints kept")
    keep_every: int | None = Field(default=None, ge=1, description="multiples of this step are never removed")

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not name.strip(". ") or not name.isprintable() or set(name) & set("/\\"):
            raise ValueError("a name is the name of a folder, without / and \\")
        return name

    @model_validator(mode="after")
    def _stages_ascend(self) -> Run:
        ends = [round(stage.until * self.steps) for stage in self.stages]
        if any(a >= b for a, b in pairwise([0, *ends, self.steps])):
            raise ValueError(f"stages must end one after another and before the last step, here at {ends}")
        return self

    def rows_from(self, step: int) -> int:
        """Rows that optimiser step ``step`` and all after it read."""
        total = 0
        for until, rows in (*self.batch.ramp, (self.steps, self.batch.rows)):
            until = min(until, self.steps)
            total, step = total + rows * max(0, until - step), max(step, until)
        return total

    def stage_at(self, step: int) -> int:
        """Stages that are over before optimiser step ``step``."""
        return sum(step >= round(stage.until * self.steps) for stage in self.stages)

    def mtp_weight_at(self, step: int) -> float:
        """Lambda of the prediction modules at optimiser step ``step``; 0 without any."""
        return 0.0 if self.model.mtp is None else self.model.mtp.weight.at(step, self.steps)

    def model_in(self, stage: int) -> ModelSpec:
        """The model as this stage trains it; after the last stage, the model itself.

        Raises:
            UsageError: the stage would need other parameters.
        """
        if stage == len(self.stages):
            return self.model
        return attending(self.model, self.stages[stage].attention, f"stages[{stage}].attention")


RESUMABLE = (
    "name", "steps", "clip", "spikes", "compile", "recompute", "log_every", "eval_every", "eval_tokens",
    "sample_every", "prompt", "save_every", "keep", "keep_every", "schedule", "optimiser.lr", "optimiser.betas",
    "optimiser.decay", "optimiser.momentum", "optimiser.eps", "optimiser.adamw", "batch",
)
"""Settings that may change when a run is resumed; anything else makes it another run."""


def check_run(run: Run) -> None:
    """Rules between the parts of a run.

    Raises:
        UsageError: the first broken rule, with path and remedy.
    """
    for stage in range(len(run.stages) + 1):
        check(run.model_in(stage), "model" if stage == len(run.stages) else f"stages[{stage}].model")
    if run.data.seq_len > run.model.context:
        raise UsageError(
            "sequences are longer than the model's context",
            where="data.seq_len", got=run.data.seq_len, expected=f"at most model.context {run.model.context}",
            fix="Lower data.seq_len or raise model.context",
        )
    if run.data.source == BOOKS:
        check_vocab(run, run.data.vocab)


def check_vocab(run: Run, vocab: int) -> None:
    """Refuse a tokenizer whose ids the model cannot hold.

    Raises:
        UsageError: the tokenizer has more ids than ``model.vocab``.
    """
    if vocab > run.model.vocab:
        raise UsageError(
            "tokenizer and model disagree",
            where="model.vocab", got=run.model.vocab, expected=f"at least the tokenizer's {vocab}",
            fix=f"Set model.vocab={vocab} or prepare the data with a smaller vocabulary",
        )


def check_prompt(run: Run, tokens: int) -> None:
    """Refuse a prompt of samples that fills the context.

    Raises:
        UsageError: ``prompt`` takes as many ``tokens`` as the context holds.
    """
    if tokens >= run.model.context:
        raise UsageError(
            "the prompt of the samples fills the context", where="prompt", got=f"{tokens} tokens",
            expected=f"below model.context {run.model.context}", fix="Shorten it",
        )


def changes(old: Run, new: Run) -> list[str]:
    """Differences a resumed run may have, as ``path: old -> new`` lines.

    Raises:
        UsageError: a setting differs that makes it another run.
    """
    before, after = old.leaves(), new.leaves()
    lines = []
    for path in dict.fromkeys([*before, *after]):
        if before.get(path) == after.get(path):
            continue
        if not any(path == free or path.startswith((f"{free}.", f"{free}[")) for free in RESUMABLE):
            raise UsageError(
                "the run folder holds another run",
                where=path, got=after.get(path), expected=before.get(path),
                fix="Use another --out, or give the same settings",
            )
        lines.append(f"{path}: {before.get(path)} -> {after.get(path)}")
    return lines
