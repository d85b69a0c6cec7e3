"""The training loop: take a batch, sum its loss, step, report, look, save. Reads downward from :meth:`Trainer.fit`."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from sextant.core import tensorfile, units
from sextant.core.allocator import keep_freed_memory
from sextant.core.cost import At
from sextant.core.errors import CheckpointError, NumericsError, Stopped, UsageError
from sextant.data.loader import Batch, Loader, bytes_of, heldout
from sextant.data.tokenizer import Tokenizer
from sextant.model.checks import notes
from sextant.model.switch import switch
from sextant.model.transformer import Transformer
from sextant.train import checkpoint
from sextant.train.backward import Backward
from sextant.train.balance import Balance
from sextant.train.board import Board
from sextant.train.evaluate import HeldOut, evaluate
from sextant.train.folder import RunFolder
from sextant.train.lanes import Lanes, lanes_for
from sextant.train.optim import train_only
from sextant.train.rng import mixed, random_states, restore_random_states
from sextant.train.run import Run, changes
from sextant.train.start import begin_from, read_by
from sextant.train.status import Clock, StepReport, memory_in_use
from sextant.train.watch import SpikeWatch, first_non_finite, non_finite_gradients

Say = Callable[[str], None]
Sampler = Callable[[Transformer, Tokenizer, str], str]


def to_stderr(line: str) -> None:
    """Progress goes to stderr; stdout is for results."""
    print(line, file=sys.stderr, flush=True)


class Trainer:
    """One run in one folder: starts it, or goes on where its newest sound checkpoint left off."""

    def __init__(
        self, run: Run, folder: RunFolder, device: torch.device | str = "cpu", say: Say = to_stderr,
        sampler: Sampler | None = None,
    ):
        keep_freed_memory()
        self.run, self.folder, self.say, self.sampler = run, folder, say, sampler
        self.device = torch.device(device)
        self.train_shards, self.heldout_shards, self.tokenizer = read_by(run)
        self.bytes_P = torch.from_numpy(self.tokenizer.token_bytes_P).to(self.device)
        self.model = run.model.build(run.numerics, device=self.device, seed=run.seed)
        self.model.recompute = run.recompute
        if run.train_only is not None:
            say(f"trains {units.count(train_only(self.model, run.train_only))} parameters: {run.train_only}")
        self.optimiser = run.optimiser.build(self.model)
        self.loader = Loader(self.train_shards, run.data)
        self.balance = Balance(run.model)
        self.spikes = SpikeWatch(run.spikes)
        self.clock = Clock(run.model.training_cost(At(run.data.seq_len)).flops, self.device)
        self.step, self.tokens, self.seconds, self.saved = 0, 0, 0.0, None
        self._resume()
        self.loader.require(run.rows_from(self.step))
        folder.write_environment(self.device)
        folder.write_config(run.to_yaml())
        folder.write_tokenizer(self.tokenizer.to_json())
        self._attend(run.stage_at(max(0, self.step - 1)))
        self.board = Board(folder.path, self.step)
        if run.schedule.warmup >= run.steps:
            say(f"note: warm-up takes {run.schedule.warmup} steps, the run only {run.steps}")
        for line in notes(run.model):
            say(f"note: {line}")
        compiled = run.compile if run.compile is not None else self.device.type == "cuda"
        lanes = Lanes(1) if compiled else lanes_for(self.model, run.batch.lanes)
        if lanes.count < run.batch.lanes and self.device.type == "cpu":
            say("note: micro-batches of this run go one after another, not side by side (batch.lanes)")
        self.backward = Backward(self.model, self.balance, lanes, self._seed)
        if compiled:
            compile_blocks(self.model)

    def fit(self) -> HeldOut:
        """Train to the last step; returns the loss on everything held out.

        Raises:
            Stopped: asked to stop by SIGINT or SIGTERM, after saving.
            NumericsError: a value was not finite, or the spike policy is used up.
        """
        try:
            with stop_requests(self._last_good) as asked:
                while self.step < self.run.steps:
                    self._advance()
                    self._look()
                    if asked():
                        self._save_if_new()
                        raise Stopped(f"stopped after step {self.step}, saved; run the same command to go on")
                self._save_if_new()
                return self._finish(asked)
        finally:
            self.board.close()

    def parameters(self) -> str:
        """``1.91 M parameters, 1.14 M active``."""
        cost = self.run.model.training_cost(At(self.run.data.seq_len))
        return f"{units.count(cost.params)} parameters, {units.count(cost.active_params)} active"

    def _advance(self) -> None:
        """One optimiser step."""
        if self.run.stage_at(self.step) != self.stage:
            self._enter_stage(self.run.stage_at(self.step))
        self.clock.start()
        batches = self._take(self.run.batch.at(self.step))
        parts = self._learn(batches)
        norm = self._gradient_norm(batches)
        loss = parts["nats"] / sum(batch.predicted for batch in batches)
        if self.spikes.is_spike(loss, norm):
            self._skip(batches, loss, norm)
        else:
            self._clip(norm)
            self.optimiser.step(self.run.schedule.factor(self.step, self.run.steps))
            self.balance.update(self.model, self.step / self.run.steps)
        parts["saturated"] = self.run.numerics.after_step(self.model)
        self.step += 1
        self._report(batches, parts, norm)

    def _attend(self, stage: int) -> None:
        """Let the layers read as this stage of the run says; weights and optimiser stay as they are."""
        model = self.run.model_in(stage)
        switch(self.model, model)
        self.stage, self.clock.flops_per_token = stage, model.training_cost(At(self.run.data.seq_len)).flops

    def _enter_stage(self, stage: int) -> None:
        self._attend(stage)
        attention = [layer.attention.to_dict() for layer in self.model.spec.layers]
        self.folder.event("stage", step=self.step, attention=attention)
        self.say(f"  stage {stage + 1} of {len(self.run.stages) + 1}: other attention, same weights")

    def _take(self, rows: int) -> list[Batch]:
        micro = self.run.batch.micro_rows
        return [self.loader.take(micro).to(self.device) for _ in range(rows // micro)]

    def _learn(self, batches: list[Batch]) -> dict[str, float]:
        """Sum gradients over micro-batches; the parts of the step's loss, by name."""
        losses = self.backward(batches, self.run.mtp_weight_at(self.step))
        for batch, loss in zip(batches, losses, strict=True):
            if not torch.isfinite(loss.total):
                self._stop_non_finite("loss", [batch], first_non_finite(self.model, batch.tokens_T, batch.stream))
        parts = [loss.parts() for loss in losses]
        return {name: sum(part[name] for part in parts) for name in parts[0]}

    def _seed(self, micro_batch: int) -> None:
        torch.manual_seed(mixed(self.run.seed, self.step, micro_batch))

    def _gradient_norm(self, batches: list[Batch]) -> float:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not norm < float("inf"):
            self._stop_non_finite("gradient", batches, ", ".join(non_finite_gradients(self.model)))
        return norm

    def _clip(self, norm: float) -> None:
        if self.run.clip is not None and norm > self.run.clip:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.run.clip / norm)

    def _skip(self, batches: list[Batch], loss: float, norm: float) -> None:
        samples = [sample for batch in batches for sample in batch.samples]
        self.folder.event("spike", step=self.step + 1, loss=loss, gnorm=norm, samples=samples)
        self.optimiser.zero()
        if self.spikes.exhausted:
            self._save_if_new()
            raise NumericsError(
                f"{self.spikes.in_a_row} steps in a row were loss spikes, the last at step {self.step + 1}",
                got=f"loss {loss:.3f}, gnorm {norm:.2f}", fix="Lower optimiser.lr or raise spikes.patience",
            )

    def _stop_non_finite(self, what: str, batches: list[Batch], where: str) -> None:
        kept = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens_T", "targets_T")}
        path = self.folder.keep_batch(self.step + 1, kept)
        raise NumericsError(
            f"{what} is not finite at step {self.step + 1}",
            where=f"first in {where}, samples {batches[0].samples[0]}-{batches[-1].samples[-1]}, batch in {path.name}",
            fix=f"No update was made; {self._last_good()}. Lower optimiser.lr",
        )

    def _last_good(self) -> str:
        return "no checkpoint yet" if self.saved is None else f"step {self.saved} is intact"

    def _report(self, batches: list[Batch], parts: dict[str, float], norm: float) -> None:
        seconds = self.clock.stop()
        tokens = sum(batch.tokens_T.numel() for batch in batches)
        predicted = sum(batch.predicted for batch in batches)
        size = sum(bytes_of(batch.targets_T, self.bytes_P) for batch in batches)
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        rate, nats = tokens / seconds, parts["nats"]
        report = StepReport(
            step=self.step, steps=self.run.steps, loss=nats / predicted, bpb=nats / math.log(2) / max(1, size),
            balance=parts["balance"], indexer=parts["indexer"], mtp=parts["mtp"] / predicted, gnorm=norm,
            lr=self.optimiser.lr, rows=sum(len(batch.samples) for batch in batches), tokens=self.tokens,
            seconds=self.seconds, tokens_per_second=rate, mfu=self.clock.mfu(rate), memory=memory_in_use(self.device),
            eta=self.clock.eta(self.run.steps - self.step), skipped=self.spikes.skipped, load=self.balance.loads(),
            saturated=int(parts["saturated"]),
        )
        self.folder.record(report.metrics())
        self.board.step(report)
        if self.step % self.run.log_every == 0 or self.step in (1, self.run.steps):
            self.say(report.line())

    def _look(self) -> None:
        """What is done every so many steps: held-out loss, a sample, a checkpoint."""
        if self.step % self.run.eval_every == 0 and self.step < self.run.steps:
            self._evaluate(self.run.eval_tokens)
        if self.step % self.run.sample_every == 0:
            self._sample()
        if self.step % self.run.save_every == 0:
            self._save()

    def _evaluate(self, limit: int | None, asked: Callable[[], bool] = lambda: False) -> HeldOut:
        batches = heldout(self.heldout_shards, self.run.data.seq_len, self.run.batch.micro_rows)
        result = evaluate(self.model, takewhile(lambda _: not asked(), batches), self.bytes_P, limit)
        if asked():
            raise Stopped(f"stopped in an evaluation, step {self.step} is saved; run the same command to go on")
        if not math.isfinite(result.loss):
            raise NumericsError(
                f"held-out loss is not finite after step {self.step}", fix=f"{self._last_good()}. Lower optimiser.lr"
            )
        self.folder.event("heldout", step=self.step, loss=result.loss, bpb=result.bpb, tokens=result.tokens)
        self.board.heldout(self.step, result.bpb)
        self.say(f"  held-out loss {result.loss:.3f} | bpb {result.bpb:.3f} | {units.count(result.tokens, 1)} tokens")
        return result

    def _sample(self) -> None:
        if self.sampler is None:
            return
        text = self.sampler(self.model, self.tokenizer, self.run.prompt)
        self.folder.sample(self.step, text)
        self.say("  sample: " + " / ".join(text.split("\n"))[:100])

    def _finish(self, asked: Callable[[], bool]) -> HeldOut:
        result = self._evaluate(None, asked)
        self.folder.event("done", step=self.step, bpb=result.bpb, loss=result.loss, seconds=self.seconds)
        return result

    def _resume(self) -> None:
        """Go on where the folder's newest sound checkpoint left off; nothing is written before all of it fits."""
        found, skipped = checkpoint.newest(self.folder.checkpoints)
        for line in skipped:
            self.say(line)
        if found is not None or self.folder.trained:
            self._refuse_another_run()
        if found is None:
            self._begin()
            return
        self._require_fit(found)
        self._restore(found)
        self.folder.truncate_metrics(found.step)
        self.folder.event("resume", step=found.step)
        self.say(f"resumed from {found.path.name} (verified)")

    def _begin(self) -> None:
        """The first start of a run: from the weights of another, if it says so."""
        if self.run.init_from is not None:
            self.say(begin_from(self.model, Path(self.run.init_from), self.tokenizer.digest, self.run.train_only))
        self.folder.truncate_metrics(0)

    def _refuse_another_run(self) -> None:
        held = self.folder.config()
        if held is not None:
            for line in changes(Run.parse(held, source=str(self.folder.path / "config.yaml")), self.run):
                self.say(f"changed: {line}")

    def _require_fit(self, found: checkpoint.Checkpoint) -> None:
        for warning in checkpoint.require_compatible(found.manifest, self._identity()):
            self.say(f"warning: {warning}")
        if found.step > self.run.steps:
            raise UsageError(
                "the run is past its last step", where=self.folder.path, got=f"steps {self.run.steps}",
                expected=f"at least {found.step}", fix="Give more --steps, or another --out",
            )

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        try:
            self.model.load_state_dict(found.parts["model"])
            self.optimiser.load(found.parts["optimizer"])
            restore_random_states(found.parts["rng"])
            self.loader.load_state_dict(found.state["loader"])
            self.spikes.load_state_dict(found.state["spikes"])
            self.tokens, self.seconds = int(found.state["tokens"]), float(found.state["seconds"])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            # A digest proves that nothing changed since it was written, not that this program wrote it.
            raise CheckpointError(
                "state of another program", where=found.path.name, got=f"{type(error).__name__}: {error}",
                fix="Resume with what wrote it, or start a new run",
            ) from error
        self.step = self.saved = found.step

    def _save_if_new(self) -> None:
        if self.saved != self.step:
            self._save()

    def _save(self) -> None:
        """A checkpoint of this step, unless something in it is not finite: then the older ones stay the newest."""
        began = time.monotonic()
        parts = {"model": self.model.state_dict(), "optimizer": self.optimiser.tensors(), "rng": random_states()}
        bad = tensorfile.first_non_finite(parts["model"] | parts["optimizer"])
        if bad is not None:
            raise NumericsError(
                f"NaN or infinity after step {self.step}, not saved", where=f"first in {bad}",
                fix=f"{self._last_good()}. Lower optimiser.lr",
            )
        state = {
            "loader": self.loader.state_dict(), "spikes": self.spikes.state_dict(),
            "tokens": self.tokens, "seconds": self.seconds,
        }
        path = checkpoint.save(self.folder.checkpoints, self.step, parts, state, self._identity(), intact=self.saved)
        self.saved = self.step
        checkpoint.retain(self.folder.checkpoints, self.run.keep, self.run.keep_every)
        self.folder.event("save", step=self.step, seconds=time.monotonic() - began)
        self.say(f"  saved {path.name} in {time.monotonic() - began:.1f}s")

    def _identity(self) -> dict[str, object]:
        """What a checkpoint must share with the run that reads it."""
        shapes: dict[str, Tensor] = self.model.state_dict()
        return {
            "recipe": self.run.name,
            "tensors": {name: list(tensor.shape) for name, tensor in shapes.items()},
            "tokenizer": self.tokenizer.digest,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "device": self.device.type,
        }


def compile_blocks(model: Transformer) -> None:
    """Compile block by block; equal layers share code, which needs an entry for every kind of layer and shape."""
    kinds = len(set(model.spec.all_layers))
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * kinds)
    for block in model.all_blocks:
        block.compile()


@contextmanager
def stop_requests(last_good: Callable[[], str]) -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a request that the loop honours after its step; the second ends at once.

    Args:
        last_good: says what is there to go on from.
    """
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if received:
            to_stderr(f"stopped before saving; {last_good()}")
            raise SystemExit(128 + number)
        received.append(number)
        to_stderr("stopping after this step; once more to stop at once")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_name(run: Run, out: Path | None) -> Path:
    """The run's folder: ``--out``, or ``runs/NAME``."""
    return out or Path("runs") / run.name
