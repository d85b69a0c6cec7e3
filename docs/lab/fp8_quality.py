"""Do the FP8 recipes learn as bf16 does, and what breaks when a path that they keep in fp32 is lowered too?

    python docs/lab/fp8_quality.py out/        # about 45 minutes on one core; resumes, --arms/--seeds share the work

First the four policies of numerics, FP8 emulated. Then fp32 in all but one path, rounded to bf16 or to E4M3 in forward
while gradients pass unchanged: the router (rows, weights, logits), the residual stream (embedding and every sum), or
the output logits. Held-out loss as trained, that of the same weights in exact fp32, and the share of experts that exact
arithmetic would have chosen otherwise. Last, what each rounding costs a model that was trained without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from sextant.axes.capacity import Experts
from sextant.axes.numerics import BF16, FP32, FP8Blocks, FP8Delayed, Numerics
from sextant.axes.routing import Auxiliary, SoftmaxTopK
from sextant.axes.routing.base import RouterModule
from sextant.axes.stability.residual import Branch
from sextant.kernels.loss import IGNORE
from sextant.lab import grid
from sextant.lab.pictures import gaps, numbers
from sextant.lab.trained import changed, exactly, mean_and_error, mixture, table, train
from sextant.model.transformer import Transformer
from sextant.train.run import Run

POLICIES: dict[str, Numerics] = {
    "fp32": FP32(), "bf16": BF16(), "fp8 delayed": FP8Delayed(), "fp8 blocks": FP8Blocks(),
}
DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
SOME = 16_384
"""Held-out tokens on which a model is judged under roundings that it was not trained with."""


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest value of the format, saturating; the gradient is that of ``x``."""
    most = torch.finfo(dtype).max
    return x + (x.clamp(-most, most).to(dtype).to(x.dtype) - x).detach()


@contextmanager
def low_residual(model: Transformer, dtype: torch.dtype) -> Iterator[None]:
    """The stream is rounded where it begins and after every sum."""

    def of_branch(module: object, rows: object, out: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return rounded(out[0], dtype), out[1]

    hooks = [module.register_forward_hook(of_branch) for module in model.modules() if isinstance(module, Branch)]
    hooks.append(model.embedding.register_forward_hook(lambda module, tokens, x_TD: rounded(x_TD, dtype)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def low_router(model: Transformer, dtype: torch.dtype) -> Iterator[None]:
    """Rows, weights and logits of every router are rounded."""

    def logits(router: RouterModule, x_TD: Tensor) -> Tensor:
        return rounded(F.linear(rounded(x_TD, dtype), rounded(router.weight, dtype)), dtype)

    with ExitStack() as patches:
        for module in model.modules():
            if isinstance(module, RouterModule):
                patches.enter_context(patch.object(module, "logits", partial(logits, module)))
        yield


@contextmanager
def low_logits(model: Transformer, dtype: torch.dtype) -> Iterator[None]:
    """Output logits are rounded before the softmax."""

    def losses(reduction: str, x_TD: Tensor, head_PD: Tensor, targets_T: Tensor, softcap: None = None) -> Tensor:
        logits_TP = rounded(F.linear(x_TD, head_PD.to(x_TD.dtype)), dtype)
        return F.cross_entropy(logits_TP, targets_T, ignore_index=IGNORE, reduction=reduction)

    with (
        patch("sextant.train.loss.summed_loss", partial(losses, "sum")),
        patch("sextant.train.evaluate.token_losses", partial(losses, "none")),
    ):
        yield


PATHS: dict[str, Callable[[Transformer, torch.dtype], AbstractContextManager[None]]] = {
    "router": low_router, "residual": low_residual, "logits": low_logits,
}
LOWERED = {f"{path} {name}": partial(PATHS[path], dtype=DTYPES[name]) for path in PATHS for name in DTYPES}
ARMS = [*POLICIES, *LOWERED]


def run(numerics: Numerics, steps: int) -> Run:
    balance = (Auxiliary(coef=1e-2, scope="global_batch"),)
    experts = Experts(experts=8, hidden=128, router=SoftmaxTopK(top_k=2, normalize=True), balance=balance)
    return mixture(experts, layers=4, width=128, steps=steps).replace(numerics=numerics)


def cell(arm: str, seed: int, steps: int) -> grid.Cell:
    around = LOWERED.get(arm, nullcontext)
    done = train(run(POLICIES.get(arm, FP32()), steps), seed, around)
    exact = exactly(done.model)
    with around(done.model):
        by_layer = changed(done, done.model, exact)
    found = {"loss": done.loss, "exact": done.loss_of(exact), "changed": sum(by_layer) / len(by_layer)}
    after = {name: lowered_after(done, exact, lower) for name, lower in LOWERED.items()} if arm == "fp32" else {}
    saturated = sum(line["saturated"] for line in done.metrics)
    return {**found, "saturated": saturated, "by layer": by_layer, "after": after, "curve": done.curve()}


def lowered_after(done: Any, exact: Transformer, lower: Callable[[Transformer], Any]) -> list[float]:
    """Rise of the held-out loss, and share of changed choices, when a trained model is rounded."""
    before = done.loss_of(exact, SOME)
    with lower(done.model):
        return [done.loss_of(done.model, SOME) - before, *mean_and_error(changed(done, done.model, exact))[:1]]


def report(cells: dict[tuple[str, int], grid.Cell]) -> str:
    """Markdown: policies against bf16, lowered paths against fp32, and what rounding costs afterwards."""
    columns = {"loss": ".4f", "exact": ".4f", "changed": ".4f", "saturated": ".0f"}
    first = table({key: one for key, one in cells.items() if key[0] in POLICIES}, columns, "bf16")
    second = table({key: one for key, one in cells.items() if key[0] in ("fp32", *LOWERED)}, columns, "fp32")
    lines = ["| rounded after training | rise of the loss | changed |", "|---|---|---|"]
    for name in LOWERED:
        rises, shares = zip(*(one["after"][name] for (arm, _), one in cells.items() if arm == "fp32"), strict=True)
        (rise, error), share = mean_and_error(list(rises)), sum(shares) / len(shares)
        lines.append(f"| {name} | {rise:+.5f} ± {error:.5f} | {share:.4f} |")
    return f"{first}\n\n{second}\n\n" + "\n".join(lines)


def draw(path: Path, cells: dict[tuple[str, int], grid.Cell]) -> None:
    """What each arm loses against its base with the same seed. A CSV beside it."""
    seeds = sorted({seed for _, seed in cells})

    def against(base: str, arms: Iterable[str]) -> dict[str, list[float]]:
        return {arm: [cells[arm, seed]["loss"] - cells[base, seed]["loss"] for seed in seeds] for arm in arms}

    groups = {
        "policies, minus bf16": against("bf16", (name for name in POLICIES if name != "bf16")),
        "one path lowered, minus fp32": against("fp32", LOWERED),
    }
    gaps(path, groups, xlabel="held-out loss minus base, nats, same seed", title="FP8 recipes and lowered paths")
    numbers(path.with_suffix(".csv"), cells, ("loss", "exact", "changed", "saturated"))


if __name__ == "__main__":
    asked = grid.arguments(__doc__, steps=200)
    cells = grid.fill(
        asked.out, asked.arms or ARMS, asked.seeds, lambda arm, seed: cell(arm, seed, asked.steps), print
    )
    if not asked.arms:
        print(report(cells))
        draw(asked.out / "fp8-quality.png", cells)
