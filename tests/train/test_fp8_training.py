"""FP8 in the loop: scales in checkpoints, resumed bit for bit; saturated casts in the status line; served in bf16."""

import json
from pathlib import Path

import pytest
import torch
from test_loop import corpus, losses, run, same_weights, trained  # noqa: F401 - fixtures

from sextant.axes.numerics import BF16, FP8Blocks, FP8Delayed, is_training_state, products
from sextant.axes.numerics.delayed import DY, DelayedProduct, W, X
from sextant.core.errors import CheckpointError, UsageError
from sextant.serve.generate import load
from sextant.train.folder import RunFolder
from sextant.train.loop import Trainer
from sextant.train.run import Run


def saturated(path: Path) -> list[int]:
    return [json.loads(line)["saturated"] for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("policy", [FP8Delayed(history=5), FP8Blocks()], ids=["delayed", "blocks"])
def test_resumes_equal_the_unbroken_run(policy, run, tmp_path):  # noqa: F811
    run = run.replace(numerics=policy, steps=8, eval_every=1000, save_every=1000)
    unbroken = trained(run, tmp_path / "unbroken")
    for step in (1, 5):
        trained(run, tmp_path / "broken", until=step)
    resumed = trained(run, tmp_path / "broken")
    assert same_weights(unbroken, resumed)
    assert losses(tmp_path / "unbroken") == losses(tmp_path / "broken")
    assert saturated(tmp_path / "unbroken") == saturated(tmp_path / "broken")
    states = unbroken.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_each_step_enters_the_history_once(run, tmp_path):  # noqa: F811
    """Two micro-batches and recomputation make one entry."""
    trainer = trained(run.replace(numerics=FP8Delayed(history=8), recompute=True), tmp_path, until=3)
    found = [module for module in products(trainer.model) if isinstance(module, DelayedProduct)]
    assert len(found) == 15
    forward = [module.history[:, [X, W]] for module in found]  # gradients of attention are 0 at zero gain
    assert all((history[:3] > 0).all() and (history[3:] == 0).all() for history in forward)
    assert all((module.history[3:] == 0).all() and (module.history[:2, DY] > 0).all() for module in found)


def test_saturated_casts_are_shown(run, tmp_path):  # noqa: F811
    """A history of one step is too short: the next step's values lie beyond it."""
    said: list[str] = []
    with RunFolder(tmp_path) as folder:
        Trainer(run.replace(numerics=FP8Delayed(history=1)), folder, say=said.append).fit()
    steps = [line for line in said if line.startswith("step ")]
    counts = saturated(tmp_path)
    assert counts[0] == 0 and sum(counts) > 0
    assert ["saturated" in line for line in steps] == [count > 0 for count in counts]


def test_another_recipe_is_refused_by_name(run, tmp_path):  # noqa: F811
    trained(run.replace(numerics=FP8Delayed()), tmp_path, until=2)
    with pytest.raises((CheckpointError, UsageError), match=r"product|numerics"):
        trained(run.replace(numerics=BF16()), tmp_path)


def test_served_in_bf16_without_the_state_of_scales(run: Run, tmp_path):  # noqa: F811
    trainer = trained(run.replace(numerics=FP8Delayed()), tmp_path, until=2)
    model, _, _ = load(tmp_path)
    assert model.numerics == BF16() and not list(products(model))
    assert not any(is_training_state(name) for name in model.state_dict())
    assert torch.equal(model.embedding.weight, trainer.model.embedding.weight)
