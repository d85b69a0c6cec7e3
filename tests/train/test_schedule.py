"""Schedules against their formulas, batch ramps, and what a declaration refuses."""

import math

import pytest

from sextant import recipes
from sextant.core.errors import UsageError
from sextant.train.run import Batch
from sextant.train.schedule import WSD, Cosine, Steps


def test_warm_up_is_linear_and_reaches_the_peak():
    schedule = Cosine(warmup=4)
    assert [schedule.factor(step, 100) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("step", [10, 33, 77, 99])
def test_cosine_formula(step):
    schedule = Cosine(warmup=10, final=0.2)
    expected = 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 90))
    assert schedule.factor(step, 100) == pytest.approx(expected)


def test_wsd_is_flat_then_linear():
    schedule = WSD(warmup=0, decay=0.25, final=0.0)
    assert {schedule.factor(step, 100) for step in range(76)} == {1.0}
    assert schedule.factor(88, 100) == pytest.approx(0.48)
    assert schedule.factor(100, 100) == 0.0


def test_steps_multiply_and_keep_a_floor():
    schedule = Steps(at=(0.5, 0.75), factor_each=0.1, final=0.05)
    assert [schedule.factor(step, 100) for step in (0, 49, 50, 74, 75)] == [1.0, 1.0, 0.1, 0.1, 0.05]


def test_a_ramp_gives_the_rows_before_each_step():
    batch = Batch(rows=32, micro_rows=4, ramp=((10, 8), (20, 16)))
    assert [batch.at(step) for step in (0, 9, 10, 19, 20, 99)] == [8, 8, 16, 16, 32, 32]


@pytest.mark.parametrize("start", [0, 3, 10, 15, 20, 29, 30])
def test_rows_to_come_are_the_sum_over_the_steps(start):
    """At once, however many steps there are."""
    run = recipes.get("nano").twin().replace(batch=Batch(rows=32, micro_rows=4, ramp=((10, 8), (20, 16), (40, 64))))
    run = run.replace(steps=30)
    assert run.rows_from(start) == sum(run.batch.at(step) for step in range(start, 30))
    assert run.replace(steps=10**15).rows_from(40) == 32 * (10**15 - 40)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (Batch, {"rows": 9, "micro_rows": 4}, "micro_rows 4 must divide"),
        (Batch, {"rows": 8, "micro_rows": 4, "ramp": [[5, 6]]}, "must divide every batch size, here 6"),
        (Batch, {"rows": 8, "micro_rows": 4, "ramp": [[9, 4], [5, 8]]}, "ascend"),
        (Steps, {"at": [0.9, 0.5]}, "ascend"),
        (WSD, {"decay": 0.0}, "expected more than 0"),
    ],
)
def test_impossible_declarations_are_refused(kind, fields, message):
    with pytest.raises(UsageError, match=message):
        kind.parse(fields)
