"""The one line a step leaves: what a person watches, with the time left."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass, field

import torch

from sextant.budget.hardware import bf16_peak
from sextant.core import units
from sextant.train.balance import Load


@dataclass
class StepReport:
    """Numbers of one optimiser step, as ``metrics.jsonl`` keeps them.

    ``loss`` is nats per predicted token; ``bpb`` bits per byte of the same; ``load`` is by MoE layer; ``indexer`` is
    what separate indexers add to the loss; ``mtp`` nats of the prediction modules' targets per predicted token, their
    mean over the modules and without lambda; ``saturated`` values that FP8 casts cut off in the step.
    """

    step: int
    steps: int
    loss: float
    bpb: float
    balance: float
    gnorm: float
    lr: float
    rows: int
    tokens: int
    seconds: float
    tokens_per_second: float
    mfu: float | None
    memory: int
    eta: float
    skipped: int
    load: dict[int, Load] = field(default_factory=dict)
    indexer: float = 0.0
    saturated: int = 0
    mtp: float = 0.0

    def line(self) -> str:
        """``step 120/600 20% | loss 3.214 | bpb 1.93 | 41.2k tok/s | ...``."""
        parts = [
            f"step {self.step}/{self.steps} {100 * self.step // self.steps}%",
            f"loss {self.loss:.3f}",
            f"bpb {self.bpb:.3f}",
            f"{units.count(self.tokens_per_second, 1).replace(' ', '')} tok/s",
            f"mfu {100 * self.mfu:.0f}%" if self.mfu is not None else "mfu -",
            f"mem {units.size(self.memory)}",
            f"gnorm {self.gnorm:.2f}",
            f"lr {self.lr:.1e}".replace("e-0", "e-"),
        ]
        if self.load:
            parts.append(f"load max/mean {max(load.max_over_mean for load in self.load.values()):.1f}")
        dropped = sum(load.drop_rate for load in self.load.values())
        if dropped:
            parts.append(f"dropped {100 * dropped / len(self.load):.2g}%")
        if self.indexer:
            parts.append(f"indexer {self.indexer:.3f}")
        if self.mtp:
            parts.append(f"mtp {self.mtp:.3f}")
        if self.saturated:
            parts.append(f"saturated {units.count(self.saturated)}")
        if self.skipped:
            parts.append(f"skipped {self.skipped}")
        return " | ".join([*parts, f"eta {units.duration(self.eta)}"])

    def metrics(self) -> dict[str, object]:
        """Plain data, one JSON line."""
        data = dict(vars(self))
        data["load"] = {str(layer): dict(vars(load)) for layer, load in self.load.items()}
        return data


class Clock:
    """Step times: rate over the last steps, so that a slow start or a pause does not spoil the estimate."""

    def __init__(self, flops_per_token: float, device: torch.device):
        self.flops_per_token, self.device = flops_per_token, device
        self.peak = bf16_peak(device)
        self.recent: list[float] = []
        self.began = time.monotonic()

    def start(self) -> None:
        """Begin a step."""
        self.began = time.monotonic()

    def stop(self) -> float:
        """Seconds of the step; the device must have finished (reading the loss waits for it)."""
        seconds = time.monotonic() - self.began
        self.recent = [*self.recent[-31:], seconds]
        return seconds

    def eta(self, left: int) -> float:
        """Seconds for ``left`` more steps, from the median of recent ones."""
        return left * sorted(self.recent)[len(self.recent) // 2]

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs (3x forward, causal half counted) over the dense bf16 peak; None where no peak is known."""
        return 3 * self.flops_per_token * tokens_per_second / self.peak if self.peak else None


def memory_in_use(device: torch.device) -> int:
    """Peak bytes so far: of the device's allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
