"""Micro-batches side by side: the same gradients and counts, the same bits again, and one lane where it must be."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from test_loop import corpus, losses, quiet, run, same_weights, trained  # noqa: F401 - fixtures

from sextant import recipes
from sextant.axes.numerics import BF16, FP8Blocks, FP8Delayed
from sextant.core.errors import NumericsError
from sextant.core.stream import Stream
from sextant.train.backward import added
from sextant.train.folder import RunFolder
from sextant.train.lanes import Lanes, draws, lanes_for
from sextant.train.loop import Trainer
from sextant.train.run import Run


@pytest.fixture
def plain(run) -> Run:  # noqa: F811
    """Without dropout, in two lanes of one row."""
    plain = run.override("model.layers[*].residual.dropout=0.0")
    return plain.replace(batch=plain.batch.replace(rows=4, micro_rows=1, lanes=2))


def gradients(run: Run, path, lanes: int, double: bool = False):  # noqa: F811
    """Of the first step: losses, gradients by name, counts."""
    with RunFolder(path) as folder:
        trainer = Trainer(run.replace(batch=run.batch.replace(lanes=lanes)), folder, say=quiet)
        if double:
            trainer.model.double()
        parts = trainer._learn(trainer._take(run.batch.rows))
        grads = {name: p.grad for name, p in trainer.model.named_parameters()}
        return parts, grads, trainer.balance.loads(), trainer.backward.lanes.count


def test_lanes_give_the_gradients_and_counts_of_one_after_another(plain, tmp_path):
    """To rounding in fp64: with the global batch counted over both waves, and with the whole step in one wave."""
    for rows in (1, 2):
        cut = plain.replace(batch=plain.batch.replace(micro_rows=rows))
        ours, grads, loads, lanes = gradients(cut, tmp_path / f"lanes{rows}", 2, double=True)
        theirs, expected, counted, one = gradients(cut, tmp_path / f"one{rows}", 1, double=True)
        assert (lanes, one) == (2, 1)
        assert loads == counted
        for part, value in theirs.items():
            assert ours[part] == pytest.approx(value, rel=1e-12)
        for name, gradient in expected.items():
            torch.testing.assert_close(grads[name], gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("numerics", [None, BF16(), FP8Blocks()], ids=["fp32", "bf16", "fp8_blocks"])
def test_a_run_in_lanes_gives_the_same_bits_again_and_resumes(plain, tmp_path, numerics):
    plain = plain if numerics is None else plain.replace(numerics=numerics)
    unbroken = trained(plain, tmp_path / "a")
    for step in (1, 4, 7):
        trained(plain, tmp_path / "b", until=step)
    resumed = trained(plain, tmp_path / "b")
    assert unbroken.backward.lanes.count == 2
    assert same_weights(unbroken, resumed)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_recomputation_and_frozen_parameters_in_lanes(plain, tmp_path):
    kept, again = (gradients(plain.replace(recompute=r), tmp_path / str(r), 2)[1] for r in (False, True))
    assert all(torch.equal(gradient, again[name]) for name, gradient in kept.items())
    _, some, _, _ = gradients(plain.replace(train_only="*.router.*"), tmp_path / "frozen", 2)
    assert any(gradient is not None for gradient in some.values())
    for name, gradient in some.items():
        assert gradient is None if "router" not in name else torch.equal(gradient, kept[name])


def test_what_draws_or_remembers_goes_one_after_another(run, plain, tmp_path):  # noqa: F811
    """And says so; its losses are those of a run that never asked for lanes."""
    fp8 = plain.replace(numerics=FP8Delayed())
    for number, one in enumerate((run.replace(batch=plain.batch), fp8)):
        lines: list[str] = []
        with RunFolder(tmp_path / f"asked{number}") as folder:
            trainer = Trainer(one, folder, say=lines.append)
            trainer.fit()
        assert trainer.backward.lanes.count == 1
        assert any("one after another" in line for line in lines)
        trained(one.replace(batch=one.batch.replace(lanes=1)), tmp_path / f"single{number}")
        assert losses(tmp_path / f"asked{number}") == losses(tmp_path / f"single{number}")


def test_asking_for_random_draws_changes_nothing(plain):
    model = plain.model.build(seed=1).eval()
    before = torch.get_rng_state()
    assert not draws(model) and not model.training
    noisy = plain.model.override("layers[*].residual.dropout=0.5").build(seed=1)
    assert draws(noisy)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", recipes.names())
def test_twins_that_ask_for_lanes_get_them(name):
    """A small forward tells what a whole one draws."""
    twin = recipes.get(name).twin()
    if twin.model.width > 256:
        pytest.skip("a rung of the ladder: its pattern is that of the first")
    model = twin.model.build(twin.numerics).train()
    length, before = min(256, twin.data.seq_len), torch.get_rng_state()
    with torch.no_grad():
        model(torch.arange(length) % twin.model.vocab, Stream.of_lengths([length]), ahead=True)
    assert draws(model) == (not torch.equal(before, torch.get_rng_state()))
    assert lanes_for(model, twin.batch.lanes).count == twin.batch.lanes


def test_a_loss_that_is_not_finite_names_its_micro_batch(plain, tmp_path):
    with RunFolder(tmp_path) as folder:
        trainer = Trainer(plain, folder, say=quiet)
        with torch.no_grad():
            trainer.model.blocks[1].feed_forward.compress.weight[0, 0] = float("nan")
        with pytest.raises(NumericsError, match="samples 0-0"):
            trainer._advance()


def test_an_error_in_a_lane_is_raised_after_the_others_have_ended():
    ended = []

    def work(number: int) -> int:
        if number == 0:
            raise ValueError("first")
        time.sleep(0.1)
        ended.append(number)
        return number

    with pytest.raises(ValueError, match="first"):
        Lanes(2).map(work, range(2))
    assert ended == [1]
    assert Lanes(2).map(lambda a, b: a * b, [1, 2, 3], [4, 5, 6]) == [4, 10, 18]


def test_lanes_share_the_threads_and_leave_others_alone():
    before = torch.get_num_threads()
    assert Lanes(2).map(lambda _: torch.get_num_threads(), range(2)) == 2 * [max(1, before // 2)]
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert torch.get_num_threads() == before and later == [before]


def test_sums_have_memory_of_their_own():
    shared = torch.ones(3)
    assert added(None, None) is None
    alone = added(None, shared)
    assert torch.equal(alone, shared) and alone.data_ptr() != shared.data_ptr()
    assert added(shared, shared, None).tolist() == [2.0, 2.0, 2.0] and shared.tolist() == [1.0, 1.0, 1.0]
