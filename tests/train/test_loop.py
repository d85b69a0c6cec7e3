"""The loop: resumes bit for bit, sums over micro-batches, stops before it learns from nonsense, and says why."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sextant import recipes
from sextant.core.errors import CheckpointError, DataError, NumericsError, Stopped, UsageError
from sextant.data.prepare import prepare
from sextant.model.spec import ModelSpec
from sextant.recipes import mai_base_1
from sextant.train import checkpoint
from sextant.train.evaluate import HeldOut
from sextant.train.folder import RunFolder
from sextant.train.loop import Trainer
from sextant.train.plots import draw, heldout_curve
from sextant.train.run import Run

WORDS = ["the", "a", "king", "queen", "of", "sea", "storm", "and", "night", "day", "lord", "speaks", "comes", "never"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A prepared folder of small random documents; prepared once per worker."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(7)
    for number in range(12):
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(200, 900)))
        (folder / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    prepare([folder], folder / "prepared", vocab=300, heldout=0.2, seed=0)
    return folder / "prepared"


@pytest.fixture
def run(corpus) -> Run:
    """A MAI-shaped run small enough for a hundred resumes, with dropout so that random states matter."""
    model = ModelSpec(
        name="tiny", vocab=300, width=16, context=32, tied=True,
        layers=mai_base_1.layers(
            2, heads=2, kv_heads=1, head_dim=8, window=8, dense=16, experts=4, top_k=2, latent=8, hidden=8, dropout=0.1,
        ),
    )
    twin = recipes.get("nano").twin()
    return twin.replace(
        name="tiny", model=model, data=twin.data.replace(source=str(corpus), vocab=300, seq_len=32), steps=12,
        batch=twin.batch.replace(rows=4, micro_rows=2), schedule=twin.schedule.replace(warmup=3), save_every=5,
        eval_every=4, sample_every=1000, log_every=1, eval_tokens=200,
    )


def quiet(line: str) -> None:
    """Progress that nobody reads."""


def trained(run: Run, path: Path, until: int | None = None) -> Trainer:
    """Train to the end, or stop after ``until`` steps as a signal would, saving."""
    with RunFolder(path) as folder:
        trainer = Trainer(run, folder, say=quiet)
        if until is None:
            trainer.fit()
        else:
            while trainer.step < until:
                trainer._advance()
            trainer._save()
        return trainer


def same_weights(a: Trainer, b: Trainer) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))


def losses(path: Path) -> list[str]:
    """Loss and gradient norm of every step, as text."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [f"{line['step']} {line['loss']!r} {line['gnorm']!r}" for line in lines]


def test_a_hundred_resumes_equal_the_unbroken_run(run, tmp_path):
    run = run.replace(steps=101, eval_every=1000, save_every=1000)
    unbroken = trained(run, tmp_path / "unbroken")
    for step in range(1, 101):
        trained(run, tmp_path / "broken", until=step)
    resumed = trained(run, tmp_path / "broken")
    assert same_weights(unbroken, resumed)
    assert losses(tmp_path / "unbroken") == losses(tmp_path / "broken")
    ours, theirs = unbroken.optimiser.tensors(), resumed.optimiser.tensors()
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_looking_does_not_change_what_is_learnt(run, tmp_path):
    often = trained(run.replace(eval_every=1, save_every=1), tmp_path / "often")
    seldom = trained(run.replace(eval_every=1000, save_every=1000), tmp_path / "seldom")
    assert same_weights(often, seldom)


def test_the_same_declaration_gives_the_same_bits(run, tmp_path):
    assert same_weights(trained(run, tmp_path / "a"), trained(run, tmp_path / "b"))


def test_another_seed_gives_another_run(run, tmp_path):
    assert not same_weights(trained(run, tmp_path / "a"), trained(run.replace(seed=5), tmp_path / "b"))


def gradients(run: Run, path: Path, rows: int) -> list[torch.Tensor]:
    with RunFolder(path) as folder:
        trainer = Trainer(run.replace(batch=run.batch.replace(micro_rows=rows)), folder, say=quiet)
        trainer.model.double()
        trainer._learn(trainer._take(4))
        return [p.grad for p in trainer.model.parameters() if p.grad is not None]


def test_micro_batches_sum_to_the_whole_batch(run, tmp_path):
    """Without dropout the gradient is the same to rounding: balance over the global batch included."""
    plain = run.override("model.layers[*].residual.dropout=0.0")
    whole, parts = gradients(plain, tmp_path / "a", 4), gradients(plain, tmp_path / "b", 1)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_recomputation_changes_neither_gradients_nor_counts(run, tmp_path):
    plain = run.override("model.layers[*].residual.dropout=0.0")
    kept, again = (gradients(plain.replace(recompute=r), tmp_path / str(r), 2) for r in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    with RunFolder(tmp_path / "counts") as folder:
        trainer = Trainer(plain.replace(recompute=True), folder, say=quiet)
        trainer._learn(trainer._take(4))
        assert [int(sum(tally.counts).sum()) for tally in trainer.balance.tallies.values()] == [4 * 32 * 2]


def test_a_nan_stops_before_the_update_and_names_its_place(run, tmp_path):
    with RunFolder(tmp_path) as folder:
        trainer = Trainer(run, folder, say=quiet)
        trainer._advance()
        with torch.no_grad():
            trainer.model.blocks[1].feed_forward.compress.weight[0, 0] = float("nan")
        before = [p.clone() for p in trainer.model.parameters()]
        with pytest.raises(NumericsError) as stop:
            trainer._advance()
    assert stop.value.exit_code == 5
    assert "parameter blocks.1.feed_forward.compress.weight" in str(stop.value) and "step 2" in str(stop.value)
    after = list(trainer.model.parameters())
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))
    assert (tmp_path / "logs" / "bad-batch-2.safetensors").is_file()


def test_a_nan_from_a_layer_is_traced_to_it(run, tmp_path):
    with RunFolder(tmp_path) as folder:
        trainer = Trainer(run, folder, say=quiet)
        trainer.model.blocks[1].attention.register_forward_hook(lambda m, i, out: (out[0] * float("nan"), out[1]))
        with pytest.raises(NumericsError, match=r"output of blocks\.1\.attention"):
            trainer._advance()


def test_an_infinite_gradient_stops_the_run(run, tmp_path):
    with RunFolder(tmp_path) as folder:
        trainer = Trainer(run, folder, say=quiet)
        trainer.model.norm.gain.register_hook(lambda g: g * float("inf"))
        with pytest.raises(NumericsError, match=r"gradient is not finite at step 1.*norm\.gain"):
            trainer._advance()


def test_a_spike_is_skipped_counted_and_replayed(run, tmp_path):
    """A loss far outside the window leaves the weights alone; a resumed run decides alike."""
    run = run.override("spikes.window=8", "spikes.sigmas=3.0", "steps=14")
    with RunFolder(tmp_path) as folder:
        trainer = Trainer(run, folder, say=quiet)
        for _ in range(6):
            trainer._advance()
        hook = trainer.model.norm.gain.register_hook(lambda g: g * 1e4)
        before = [p.clone() for p in trainer.model.parameters()]
        trainer._advance()
        hook.remove()
        assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
        trainer._save()
        state = trainer.spikes.state_dict()
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "spike"] == [7]
    with RunFolder(tmp_path) as folder:
        assert Trainer(run, folder, say=quiet).spikes.state_dict() == state


def test_spikes_without_end_stop_the_run(run, tmp_path):
    run = run.override("spikes.window=8", "spikes.sigmas=3.0", "spikes.patience=2")
    with RunFolder(tmp_path) as folder:
        trainer = Trainer(run, folder, say=quiet)
        for _ in range(6):
            trainer._advance()
        trainer.model.norm.gain.register_hook(lambda g: g * 1e4 ** (trainer.step - 5))
        trainer._advance()
        with pytest.raises(NumericsError, match="2 steps in a row"):
            trainer._advance()
    assert checkpoint.steps(tmp_path / "checkpoints") == [7]


def test_the_folder_of_another_run_is_refused(run, tmp_path):
    trained(run, tmp_path, until=2)
    with RunFolder(tmp_path) as folder, pytest.raises(UsageError, match=r"another run: model\.width"):
        Trainer(run.override("model.width=24"), folder, say=quiet)


def test_free_settings_may_change_and_are_reported(run, tmp_path):
    trained(run, tmp_path, until=2)
    said: list[str] = []
    with RunFolder(tmp_path) as folder:
        Trainer(run.override("steps=9", "optimiser.lr=0.001"), folder, say=said.append)
    assert "changed: steps: 12 -> 9" in said and "changed: optimiser.lr: 0.004 -> 0.001" in said


def test_a_tokenizer_too_large_for_the_model_is_refused(run, tmp_path):
    with RunFolder(tmp_path) as folder, pytest.raises(UsageError, match=r"tokenizer and model disagree: model\.vocab"):
        Trainer(run.override("model.vocab=200"), folder, say=quiet)


def test_sequences_beyond_the_context_are_refused(run, tmp_path):
    with RunFolder(tmp_path) as folder, pytest.raises(UsageError, match=r"data\.seq_len .*model\.context 32"):
        Trainer(run.override("data.seq_len=64"), folder, say=quiet)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(run, tmp_path, number):
    """In a process of its own: exit 75, then the same command ends with the bits of the unbroken run."""
    run = run.replace(steps=40, eval_every=1000, save_every=1000)
    run.save(tmp_path / "run.yaml")
    command = [sys.executable, "-m", "sextant", "train", str(tmp_path / "run.yaml"), "-o", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "CUDA_VISIBLE_DEVICES": ""}
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert first.stderr is not None
    for line in first.stderr:
        if line.startswith("step 5/"):
            first.send_signal(number)
            break
    first.stderr.read()
    assert first.wait(60) == 75
    again = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "resumed from step-" in again.stderr
    unbroken = trained(run, tmp_path / "unbroken")
    broken, _ = checkpoint.search(tmp_path / "out" / "checkpoints")
    assert broken is not None and broken.step == 40
    saved = broken.parts["model"]
    assert all(torch.equal(value, saved[name]) for name, value in unbroken.model.state_dict().items())


def test_a_stop_still_takes_the_looks_of_its_step(run, tmp_path):
    with RunFolder(tmp_path / "broken") as folder, pytest.raises(Stopped):
        Trainer(run, folder, say=lambda line: line.startswith("step 4/") and signal.raise_signal(2)).fit()
    trained(run, tmp_path / "broken")
    trained(run, tmp_path / "unbroken")
    assert heldout_curve(tmp_path / "broken") == heldout_curve(tmp_path / "unbroken")


def test_data_that_cannot_last_is_refused_at_the_start(run, tmp_path):
    with RunFolder(tmp_path) as folder, pytest.raises(DataError, match=r"too few samples: data\.epochs 1"):
        Trainer(run.override("data.epochs=1", "steps=10000"), folder, say=quiet)


def test_a_prompt_that_fills_the_context_is_refused_at_the_start(run, tmp_path):
    with RunFolder(tmp_path) as folder, pytest.raises(UsageError, match="prompt of the samples fills the context"):
        Trainer(run.replace(prompt="the king " * 40), folder, say=quiet)


def test_the_environment_names_the_device(run, tmp_path):
    trained(run, tmp_path, until=1)
    assert json.loads((tmp_path / "env.json").read_text())["device"] == "cpu"


def test_stopping_inside_the_loop_raises_after_saving(run, tmp_path):
    with RunFolder(tmp_path) as folder:
        trainer = Trainer(run, folder, say=lambda line: line.startswith("step 3/") and signal.raise_signal(2))
        with pytest.raises(Stopped) as stop:
            trainer.fit()
    assert stop.value.exit_code == 75
    assert checkpoint.steps(tmp_path / "checkpoints") == [3]


def test_stopping_in_the_last_evaluation_loses_no_step(run, tmp_path):
    run = run.replace(steps=3)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if "saved step-00000003" in line:
            signal.raise_signal(2)

    with RunFolder(tmp_path) as folder, pytest.raises(Stopped, match="step 3 is saved"):
        Trainer(run, folder, say=say).fit()
    assert not any("held-out" in line for line in said)
    assert trained(run, tmp_path).saved == 3


def test_weights_that_are_not_finite_are_never_saved(run, tmp_path):
    """The update itself breaks them: the next loss would be too late to say so."""
    trained(run, tmp_path, until=2)

    def say(line: str) -> None:
        if line.startswith("step 3/"):
            trainer.model.blocks[0].around_attention.norm.gain.data[0] = float("inf")

    with RunFolder(tmp_path) as folder, pytest.raises(NumericsError, match=r"after step 3, .*step 2 is intact") as stop:
        trainer = Trainer(run.replace(steps=3), folder, say=say)
        trainer.fit()
    assert stop.value.exit_code == 5
    assert checkpoint.steps(tmp_path / "checkpoints") == [2]


def test_a_held_out_loss_that_is_not_finite_stops_the_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr("sextant.train.loop.evaluate", lambda *_: HeldOut(float("nan"), 1, 1))
    with RunFolder(tmp_path) as folder, pytest.raises(NumericsError, match="held-out loss is not finite after step 4"):
        Trainer(run, folder, say=quiet).fit()


def files_of(path: Path) -> dict[str, bytes]:
    """All but what TensorBoard's own thread may still be writing."""
    files = [file for file in path.rglob("*") if file.is_file() and file.parent.name != "tensorboard"]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def test_a_refused_start_changes_nothing_in_the_folder(run, tmp_path):
    trained(run, tmp_path / "run", until=2)
    words = tmp_path / "other.txt"
    words.write_text("\n\n".join(f"other words {number} of another book" for number in range(200)), encoding="utf-8")
    prepare([words], tmp_path / "prepared", vocab=280, heldout=0.2, seed=0)
    (tmp_path / "run" / "config.yaml").unlink()
    before = files_of(tmp_path / "run")
    for other in (run.replace(name="other"), run.override(f"data.source={tmp_path / 'prepared'}", "data.vocab=280")):
        with RunFolder(tmp_path / "run") as folder, pytest.raises(CheckpointError, match="another"):
            Trainer(other, folder, say=quiet)
        assert files_of(tmp_path / "run") == before


def test_a_folder_where_nothing_was_trained_takes_another_start(run, tmp_path):
    with RunFolder(tmp_path) as folder:
        Trainer(run, folder, say=quiet)
    assert trained(run.replace(seed=9), tmp_path, until=2).step == 2
    assert [line.split()[0] for line in losses(tmp_path)] == ["1", "2"]


def test_another_run_is_refused_before_the_first_save_too(run, tmp_path):
    with RunFolder(tmp_path) as folder:
        Trainer(run, folder, say=quiet)._advance()
    before = files_of(tmp_path)
    with RunFolder(tmp_path) as folder, pytest.raises(UsageError, match="another run"):
        Trainer(run.override("model.width=24"), folder, say=quiet)
    assert files_of(tmp_path) == before


def test_fewer_steps_than_done_are_refused(run, tmp_path):
    trained(run, tmp_path, until=4)
    with RunFolder(tmp_path) as folder, pytest.raises(UsageError, match=r"past its last step: .*got steps 3"):
        Trainer(run.replace(steps=3), folder, say=quiet)


@pytest.mark.parametrize("seed", [2**24, 20251125, 2**63 - 1])
def test_any_seed_trains(run, tmp_path, seed):
    trained(run.replace(seed=seed, data=run.data.replace(seed=seed)), tmp_path, until=1)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("state", "loader", None),
        ("state", "tokens", None),
        ("state", "seconds", "long"),
        ("optimizer", "embedding.weight.exp_avg", torch.ones(3)),
        ("optimizer", "embedding.weight.exp_avg", torch.full((300, 16), float("nan"))),
        ("optimizer", "no.such.exp_avg", torch.ones(3)),
        ("rng", "python", torch.ones(3, dtype=torch.uint8)),
        ("rng", "torch.cpu", None),
    ],
)
def test_a_sound_digest_does_not_make_a_sound_state(run, tmp_path, part, name, value):
    """Written by another program, or an older one: refused as a checkpoint, never as an internal error."""
    trained(run, tmp_path, until=2)
    found, _ = checkpoint.search(tmp_path / "checkpoints")
    assert found is not None
    parts = {**found.parts, "state": found.state}
    rest = {key: held for key, held in parts[part].items() if key != name}
    parts[part] = rest if value is None else {**rest, name: value}
    state = parts.pop("state")
    checkpoint.save(tmp_path / "checkpoints", 2, parts, state, found.manifest["identity"])
    with RunFolder(tmp_path) as folder, pytest.raises(CheckpointError):
        Trainer(run, folder, say=quiet)


def test_damaged_logs_neither_stop_a_run_nor_its_plots(run, tmp_path):
    trained(run, tmp_path, until=5)
    for name in ("metrics.jsonl", "events.jsonl"):
        with (tmp_path / name).open("ab") as log:
            log.write(b'{"step": \xff}\n[]\n{"step": "x"}\n')
    trained(run, tmp_path)
    assert draw(tmp_path)
    assert [line.split()[0] for line in losses(tmp_path)] == [str(step) for step in range(1, 13)]


def test_bits_per_byte_is_nats_over_bytes(run, tmp_path):
    """The reported training figure against the targets' own text."""
    trained(run.replace(steps=1), tmp_path)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    with RunFolder(tmp_path / "again") as folder:
        trainer = Trainer(run, folder, say=quiet)
        batches = trainer._take(4)
        size = sum(int(trainer.bytes_P[b.targets_T[b.targets_T >= 0]].sum()) for b in batches)
        predicted = sum(b.predicted for b in batches)
    assert line["bpb"] == pytest.approx(line["loss"] * predicted / size / 0.693147, rel=1e-5)


def test_plots_are_drawn_beside_their_numbers(run, tmp_path):
    from sextant.train.plots import draw

    trained(run, tmp_path)
    written = {path.name for path in draw(tmp_path)}
    assert written == {"loss.csv", "heldout.csv", "lr.csv", "load.csv", "loss.png", "lr.png", "load.png"}
    assert (tmp_path / "plots" / "load.csv").read_text().startswith("step,layer,max_over_mean,unused,entropy,max_vio,")
    assert len((tmp_path / "plots" / "load.csv").read_text().splitlines()) == 1 + 12


def test_the_status_line_has_what_people_watch(run, tmp_path):
    said: list[str] = []
    with RunFolder(tmp_path) as folder:
        Trainer(run, folder, say=said.append).fit()
    line = next(line for line in said if line.startswith("step 6/12 50%"))
    for part in ("loss ", "bpb ", "tok/s", "mfu -", "mem ", "gnorm ", "lr ", "load max/mean ", "eta "):
        assert f"| {part}" in line or part in line


def test_tensorboard_gets_the_same_numbers_when_it_is_there(run, tmp_path, monkeypatch):
    """With a writer in place of the package's: every step's loss, and the load of every MoE layer."""
    from sextant.train import board

    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int):
            assert folder == str(tmp_path / "tensorboard") and purge_step == 1

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append(("closed", 0.0, 0))

    monkeypatch.setattr(board, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type("package", (), {"SummaryWriter": Writer}))
    trained(run, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [value for name, value, _ in written if name == "train/loss"] == [line["loss"] for line in lines]
    assert sum(name == "load/1/entropy" for name, _, _ in written) == run.steps
    assert written[-1][0] == "closed"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(number):
    from sextant.train.loop import stop_requests

    with pytest.raises(SystemExit) as ended, stop_requests(lambda: "step 3 is intact") as asked:
        signal.raise_signal(number)
        assert asked()
        signal.raise_signal(number)
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)


def test_a_lasting_change_of_level_is_not_skipped_for_ever(run, tmp_path):
    run = run.override("spikes.window=16", "steps=30")
    with RunFolder(tmp_path) as folder:
        trainer = Trainer(run, folder, say=quiet)
        for _ in range(10):
            trainer._advance()
        trainer.model.norm.gain.register_hook(lambda g: g * 50)
        for _ in range(12):
            trainer._advance()
        assert 1 <= trainer.spikes.skipped <= 4 and trainer.spikes.in_a_row == 0


@pytest.mark.parametrize("name", ["nano", "mai-base-1", "mixtral-8x7b", "gemma-3-4b"])
def test_compiled_blocks_give_the_same_gradients(name):
    """The graphs that compilation makes, run without code generation, against plain execution; a packed batch too."""
    from sextant.core.stream import Stream
    from sextant.train.loss import Balance, micro_loss

    spec = recipes.get(name).twin().model
    spec = spec.replace(layers=spec.layers[-2:])
    plain, compiled = spec.build(seed=3), spec.build(seed=3)
    for block in compiled.blocks:
        block.compile(backend="aot_eager")
    tokens_T = torch.randint(spec.vocab, (128,))
    for lengths in ([64, 64], [50, 78]):
        balance, stream = Balance(spec), Stream.of_lengths(lengths)
        for model in (plain, compiled):
            model.zero_grad()
            balance.start()
            micro_loss(model, tokens_T, tokens_T.roll(-1), stream, balance, 128, 128).total.backward()
        for (parameter, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            noise = 3e-6 * a.grad.abs().max().item()  # where large terms cancel, an order of sums shows
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=noise, msg=parameter)
