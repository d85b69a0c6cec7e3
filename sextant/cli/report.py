"""``sextant report``: look inside a model: what sparse layers read, expert load, where gradient arrives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sextant.cli.frame import verb

if TYPE_CHECKING:
    from rich.table import Table as View

    from sextant.lab.inside import Inside
    from sextant.model.transformer import Transformer
    from sextant.train.run import Run

app = verb()

LEGEND = (
    "U: past blocks that the queries of one key head read; even: the same by chance",
    "mass: share of full attention's weight in what was read",
    "recall: mass over that of the best equally many blocks",
    "peak, block 0: choices of the busiest and of the first block, over the mean",
    "gradient: how evenly it reaches the prompt at the layer's input, 1 is even",
)


@app.command()
def report(
    what: Annotated[str, typer.Argument(metavar="RUN_OR_RECIPE", help="A run folder, or a recipe's fresh twin.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for pictures and CSV.")] = None,
    tokens: Annotated[str, typer.Option(help="Held-out tokens to look at, such as 2k.")] = "2k",
    scored: Annotated[int, typer.Option(help="Last tokens of a window that carry loss, for the gradient.", min=1)] = 10,
    settings: Annotated[list[str] | None, typer.Option("--set", help="path=value for a recipe.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Look inside a trained run, or a recipe's twin before training."""
    import json

    from sextant.core.units import parse_size
    from sextant.lab.inside import write

    model, run, source = _model(what, settings or [], device)
    found = _inspect(model, run, parse_size(tokens), scored)
    folder = out or (Path(what) / "report" if Path(what).is_dir() else Path("reports") / run.name)
    paths = write(found, folder)
    if as_json:
        facts = {"name": run.name, "source": source, **found.facts(), "files": [str(path) for path in paths]}
        typer.echo(json.dumps(facts, indent=1))
        return
    _print(found, f"{run.name} ({source}), {found.tokens:,} held-out tokens")
    typer.echo(f"\n{len(paths)} files in {folder}")


def _model(what: str, settings: list[str], device: str) -> tuple[Transformer, Run, str]:
    """The model, its run, and where its weights are from.

    Raises:
        UsageError: settings for a trained run, which is as it is.
    """
    from sextant.cli.runs import pick_device, resolve
    from sextant.core.errors import UsageError

    where = pick_device(device)
    if not Path(what).is_dir():
        run = resolve(what, "twin", settings)[0]
        return run.model.build(run.numerics, device=where, seed=run.seed), run, "fresh weights"
    if settings:
        raise UsageError("a trained run cannot be set", where="--set", fix="Use --set with a recipe or a run file")
    from sextant.serve.generate import load

    model, _, run = load(what, where)
    return model, run, "trained"


def _inspect(model: Transformer, run: Run, tokens: int, scored: int) -> Inside:
    from sextant.data.loader import heldout
    from sextant.data.prepare import opened
    from sextant.lab.inside import inspect

    _, shards, _ = opened(run.data)
    batch = next(heldout(shards, run.data.seq_len, max(1, tokens // run.data.seq_len)))
    return inspect(model, batch.to(model.embedding.weight.device), scored)


def _print(found: Inside, title: str) -> None:
    from sextant.cli.frame import console

    out = console()
    out.print(title, style="bold")
    out.print(_layers_view(found))
    if found.experts:
        out.print("\nexperts", style="bold")
        out.print(_experts_view(found))
    for alarm in found.alarms:
        out.print(f"alarm: {alarm}", style="bold")
    out.print("\n" + "\n".join(LEGEND), style="dim")


def _view(*columns: str) -> View:
    from rich.table import Table as View

    view = View(box=None, pad_edge=False)
    for name in columns:
        view.add_column(name, justify="left" if name == "attention" else "right", no_wrap=True)
    return view


def _layers_view(found: Inside) -> View:
    names = ("union", "union_by_chance", "mass", "recall", "peak", "sink", "gini", "gradient")
    view = _view("layer", "attention", "U", "even", "mass", "recall", "peak", "block 0", "gini", "gradient")
    for layer in found.layers():
        view.add_row(str(layer["layer"]), layer["attention"], *(_number(layer.get(name)) for name in names))
    return view


def _experts_view(found: Inside) -> View:
    view = _view("layer", "experts", "peak", "unused", "gini")
    for index, facts in found.facts()["experts"].items():
        copies = facts["copies"]
        unused = str(copies.count(0))
        view.add_row(index, str(len(copies)), _number(facts["peak"]), unused, _number(facts["gini"]))
    return view


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.1f}" if value >= 100 else f"{value:.2f}"
