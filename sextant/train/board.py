"""TensorBoard events beside ``metrics.jsonl``, when TensorBoard is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from sextant.train.status import StepReport


class Board:
    """Writes scalars of each step to ``RUN/tensorboard``; does nothing without the package."""

    def __init__(self, run_folder: Path, resumed_at: int):
        self.writer = None
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(run_folder / "tensorboard"), purge_step=resumed_at + 1)

    def step(self, report: StepReport) -> None:
        """One step's scalars; load by MoE layer."""
        if self.writer is None:
            return
        for name in ("loss", "bpb", "balance", "indexer", "mtp", "gnorm", "lr", "tokens_per_second"):
            self.writer.add_scalar(f"train/{name}", getattr(report, name), report.step)
        for layer, load in report.load.items():
            for name, value in vars(load).items():
                self.writer.add_scalar(f"load/{layer}/{name}", value, report.step)

    def heldout(self, step: int, bpb: float) -> None:
        """Held-out bits per byte."""
        if self.writer is not None:
            self.writer.add_scalar("heldout/bpb", bpb, step)

    def close(self) -> None:
        """Flush what is buffered."""
        if self.writer is not None:
            self.writer.close()
