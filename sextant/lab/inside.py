"""A report on one model over some held-out text: choices of sparse layers, expert load, gradient by depth."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sextant.core import fs
from sextant.data.loader import Batch
from sextant.kernels.loss import IGNORE
from sextant.lab.selection import Choice, gini, look, participation
from sextant.model.transformer import Transformer
from sextant.train.plots import save_png, write_csv


@dataclass(frozen=True)
class Inside:
    """What was found.

    Attributes:
        choices: of every selecting layer.
        experts: copies that every expert received, by MoE layer.
        gradients: participation ratio at the input of every layer, when the last ``scored`` tokens carry loss.
    """

    attention: list[str]
    tokens: int
    scored: int
    choices: list[Choice]
    experts: dict[int, list[int]]
    gradients: list[float]

    @property
    def alarms(self) -> list[str]:
        """Layers whose choices pile up on the first block."""
        return [
            f"layer {choice.layer}: block 0 is chosen {choice.sink:.1f}x as often as the mean block "
            f"({choice.sink_by_chance:.1f}x if all past blocks were as likely)"
            for choice in self.choices if choice.alarm
        ]

    def layers(self) -> list[dict[str, Any]]:
        """One flat record per layer; a layer that does not choose has only its name and its gradient."""
        by_layer = {choice.layer: choice for choice in self.choices}
        return [
            {"layer": index, "attention": kind, **_record(by_layer.get(index)), "gradient": _known(gradient)}
            for index, (kind, gradient) in enumerate(zip(self.attention, self.gradients, strict=True))
        ]

    def facts(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "tokens": self.tokens, "scored": self.scored, "layers": self.layers(), "alarms": self.alarms,
            "load": {str(choice.layer): choice.load_M for choice in self.choices},
            "experts": {
                str(index): {"peak": max(counts) * len(counts) / sum(counts), "gini": gini(counts), "copies": counts}
                for index, counts in self.experts.items()
            },
        }


def _record(choice: Choice | None) -> dict[str, Any]:
    if choice is None:
        return {}
    names = (
        "block", "queries", "read", "union", "union_by_chance", "mass", "recall", "peak", "sink", "sink_by_chance",
        "gini",
    )
    return {name: _known(getattr(choice, name)) for name in names}


def _known(value: float) -> float | None:
    """None for what is not a number, which JSON cannot hold."""
    return None if math.isnan(value) else value


def inspect(model: Transformer, batch: Batch, scored: int) -> Inside:
    """Run a batch of whole sequences, once to look and once backward from the last ``scored`` tokens of each."""
    was_training = model.training
    model.eval()
    choices, out = look(model, batch.tokens_T, batch.stream)
    gradients = participation(model, batch.tokens_T, last_only(batch, scored), batch.stream)
    model.train(was_training)
    kinds = [layer.attention.kind for layer in model.spec.layers]
    experts = {index: routing.counts_E().tolist() for index, routing in out.routings.items()}
    return Inside(kinds, batch.tokens_T.numel(), scored, choices, experts, gradients)


def last_only(batch: Batch, scored: int) -> Tensor:
    """Targets of the last tokens of every sequence; the others are ignored."""
    length_T = torch.tensor(batch.stream.lengths, device=batch.tokens_T.device)[batch.stream.sequence_T]
    early_T = batch.stream.positions_T < length_T - scored
    return batch.targets_T.masked_fill(early_T, IGNORE)


def write(found: Inside, out: Path) -> list[Path]:
    """Numbers as CSV, and heat maps as PNG when matplotlib is installed; returns what was written."""
    fs.make_folder(out)
    layers = found.layers()
    columns = list(dict.fromkeys(name for layer in layers for name in layer))
    written = [write_csv(out / "layers.csv", columns, ([layer.get(name) for name in columns] for layer in layers))]
    if found.choices:
        written.append(write_csv(out / "load.csv", ("layer", "block", "share", "share_by_chance"), (
            (choice.layer, block, *shares)
            for choice in found.choices
            for block, shares in enumerate(zip(choice.load_M, choice.chance_M, strict=True))
        )))
        written.append(write_csv(out / "choices.csv", ("layer", "query_block", "key_block", "share"), (
            (choice.layer, c, m, share)
            for choice in found.choices for c, row in enumerate(choice.map_CM) for m, share in enumerate(row[: c + 1])
        )))
    if found.experts:
        written.append(write_csv(out / "experts.csv", ("layer", "expert", "copies"), (
            (layer, expert, count) for layer, counts in found.experts.items() for expert, count in enumerate(counts)
        )))
    return written + (_draw(found, out) if importlib.util.find_spec("matplotlib") else [])


def _draw(found: Inside, out: Path) -> list[Path]:
    drawn = [_draw_gradients(found, out / "gradient.png")]
    if found.choices:
        drawn.append(_draw_maps(found, out / "choices.png"))
        loads = {choice.layer: choice.load_M for choice in found.choices}
        title = "Choices of past blocks, over the mean block"
        drawn.append(_draw_load(loads, "block of keys", title, out / "load.png"))
    if found.experts:
        title = "Copies, over the mean expert"
        drawn.append(_draw_load(found.experts, "expert", title, out / "experts.png"))
    return drawn


def _draw_gradients(found: Inside, path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3))
    title = f"Gradient of the last {found.scored} tokens, spread over the prompt"
    axes = figure.add_subplot(xlabel="input of layer", ylabel="participation ratio", title=title, ylim=(0, 1.02))
    axes.plot(range(len(found.gradients)), found.gradients, "o-")
    axes.grid(alpha=0.3)
    return save_png(figure, path)


def _draw_maps(found: Inside, path: Path) -> Path:
    """Who reads what: one map for each selecting layer, query blocks downward, key blocks to the right."""
    from matplotlib.figure import Figure

    across = min(4, len(found.choices))
    down = -(-len(found.choices) // across)
    figure = Figure(figsize=(2.6 * across + 0.8, 2.7 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    for place in axes.flat[len(found.choices) :]:
        place.axis("off")
    for place, choice in zip(axes.flat, found.choices, strict=False):
        image = place.imshow(choice.map_CM, vmin=0, vmax=1, interpolation="nearest")
        place.set_title(f"layer {choice.layer}: {choice.kind}", fontsize=9)
        place.tick_params(labelsize=7)
        figure.colorbar(image, ax=place, fraction=0.046)
    figure.supxlabel("block of keys", fontsize=9)
    figure.supylabel("block of queries", fontsize=9)
    return save_png(figure, path)


def _draw_load(shares: dict[int, Any], what: str, title: str, path: Path) -> Path:
    """Layers downward; layers with fewer columns leave the rest of their row blank."""
    from matplotlib.figure import Figure

    widest = max(len(row) for row in shares.values())
    rows = [
        [value * len(row) / max(sum(row), 1e-30) for value in row] + [float("nan")] * (widest - len(row))
        for row in shares.values()
    ]
    figure = Figure(figsize=(7, 1.2 + 0.35 * len(rows)))
    axes = figure.add_subplot(xlabel=what, ylabel="layer", title=title)
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", vmin=0)
    axes.set_yticks(range(len(rows)), [str(layer) for layer in shares])
    figure.colorbar(image, ax=axes)
    return save_png(figure, path)
