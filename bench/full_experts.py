"""What each rule for full experts costs: time of forward and backward, memory kept between them, rows and zeros.

One stack of experts under a skewed load, fp32. Times are processor time, best of a few, so neighbours on the machine
disturb them least; read ratios.

    OMP_NUM_THREADS=1 python bench/full_experts.py
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from sextant.axes.capacity.stack import ExpertStack
from sextant.axes.routing import BlockPadded, Capacity, CappedRounds, Dropless, Dynamic, Overflow, Routing, Usage
from sextant.core.stream import Stream

TOKENS, CHOSEN, EXPERTS, WIDTH, HIDDEN, TIMES = 4096, 4, 16, 256, 128, 5
RULES: tuple[Overflow, ...] = (
    Dropless(), Capacity(), BlockPadded(), Dynamic(), Dropless(tile=64), CappedRounds(cap=4096), Dropless(),
)  # fmt: skip


def load() -> Routing:
    """Low numbers are liked better."""
    logits_TE = torch.randn(TOKENS, EXPERTS) - torch.arange(EXPERTS) / 10
    gates_TA, experts_TA = logits_TE.softmax(-1).topk(CHOSEN)
    return Routing(logits_TE, logits_TE.softmax(-1), experts_TA, gates_TA.requires_grad_())


def step(rule: Overflow, experts: ExpertStack, x_TD: Tensor, routing: Routing) -> tuple[float, int, Usage]:
    """Seconds, kept bytes without the matrices, and what the experts held."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in experts.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in owned:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    begun = time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y_TD, usage = rule.compute(experts, x_TD, routing)
    bytes_ = sum(x.untyped_storage().nbytes() for x in kept.values())
    kept.clear()
    torch.autograd.grad(y_TD.sum(), (x_TD, *experts.parameters()))
    return time.process_time() - begun, bytes_, usage


def main() -> None:
    torch.manual_seed(0)
    experts, x_TD = ExpertStack(EXPERTS, WIDTH, HIDDEN, "swiglu"), torch.randn(TOKENS, WIDTH, requires_grad=True)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    routing, stream = load(), Stream.of_lengths([TOKENS])
    print("| rule | ms | kept MiB | rows | zeros | dropped | peak | rounds |\n|---|---|---|---|---|---|---|---|")
    for rule in RULES:
        admitted = rule.admit(routing, stream, training=True)
        runs = [step(rule, experts, x_TD, admitted) for _ in range(TIMES)]
        seconds, (_, kept, usage) = min(run[0] for run in runs), runs[0]
        shown = rule.kind + (f" tile {tile}" if (tile := getattr(rule, "tile", None)) else "")  # type: ignore[attr-defined]
        print(f"| {shown} | {1e3 * seconds:.0f} | {kept / 2**20:.1f} | {usage.rows} | {usage.waste():.1%} "
              f"| {admitted.drop_rate():.1%} | {usage.peak} | {usage.rounds} |")  # fmt: skip


if __name__ == "__main__":
    main()
