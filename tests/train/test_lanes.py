"""Micro-batches side by side: the same gradients and counts, the same bits again, and one lane where it must be."""

from __future__ import annotations

import pytest
import torch

from sextant import recipes
from sextant.axes.numerics import BF16, FP8Blocks, FP8Delayed
from sextant.core.errors import NumericsError
from sextant.core.stream import Stream
from sextant.train.backward import Backward, added
from sextant.train.balance import Balance
from sextant.train.folder import RunFolder
from sextant.train.lanes import Lanes, draws, lanes_for
from sextant.train.loop import Trainer
from sextant.train.run import Run
from tests.train.test_loop import corpus, losses, quiet, run, same_weights, trained  # noqa: F401

TWINS = [name for name in recipes.names() if recipes.get(name).twin().batch.lanes > 1]


@pytest.fixture
def plain(run) -> Run:  # noqa: F811
    """Without dropout, in two lanes of one row."""
    plain = run.override("model.layers[*].residual.dropout=0.0")
    return plain.replace(batch=plain.batch.replace(rows=4, micro_rows=1, lanes=2))


def one_after_another(trainer: Trainer) -> None:
    trainer.backward.lanes = Lanes(1)


def gradients(run: Run, path, lanes: int, double: bool = False):  # noqa: F811
    """Of the first step: losses, gradients by name, counts."""
    with RunFolder(path) as folder:
        trainer = Trainer(run.replace(batch=run.batch.replace(lanes=lanes)), folder, say=quiet)
        if double:
            trainer.model.double()
        parts = trainer._learn(trainer._take(run.batch.rows))
        grads = {name: p.grad for name, p in trainer.model.named_parameters()}
        return parts, grads, trainer.balance.loads(), trainer.backward.lanes.count
