"""A process may die at any instant of a save: no acknowledged step is lost (faults A1, A2)."""

from collections import Counter

import killpoints
import pytest
import torch

from sextant.core import fs
from sextant.train import checkpoint


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the victims are forked
    yield killpoints.Sweep(tmp_path_factory.mktemp("kill") / "checkpoints")
    torch.set_num_threads(threads)


def faults(outcomes):
    return [(outcome.at, outcome.faults) for outcome in outcomes if outcome.faults]


def test_death_before_every_primitive_step_loses_nothing(sweep):
    outcomes = [sweep.at_primitive(k) for k in range(len(sweep.operations))]
    assert len(outcomes) >= 100
    assert all(outcome.killed for outcome in outcomes)
    assert {"open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir", "fsync-folder"} == {o.at for o in outcomes}
    assert faults(outcomes) == []
    assert sum(outcome.leftovers for outcome in outcomes) > len(outcomes) / 2  # the kills did interrupt something


def test_death_at_random_times_loses_nothing(sweep):
    outcomes = [sweep.at_time(seconds) for seconds in killpoints.random_times(40, sweep.seconds, seed=5)]
    assert all(outcome.killed for outcome in outcomes)
    assert faults(outcomes) == []


def test_death_while_cleaning_up_after_a_death_loses_nothing(sweep):
    outcomes = [sweep.twice(k, k % 10) for k in range(0, len(sweep.operations), 7)]
    assert Counter(outcome.killed for outcome in outcomes)[True] == len(outcomes)
    assert faults(outcomes) == []


def test_the_sweep_sees_a_writer_that_overwrites(tmp_path, monkeypatch):
    """A save that fills the newest folder in place is what the sweep must catch."""
    monkeypatch.setattr(checkpoint, "_publish", overwrite)
    sweep = killpoints.Sweep(tmp_path / "checkpoints")
    assert any("lost" in fault for k in range(12, 30) for fault in sweep.at_primitive(k).faults)


def overwrite(aside, final):
    """The mistake: delete, then write under the final name, file by file."""
    for older in final.parent.glob("step-*"):
        fs.remove_tree_safely(older)
    fs.make_folder(final)
    for path in sorted(aside.iterdir()):
        fs.rename(path, final / path.name)
    fs.remove_tree_safely(aside)
