"""``sextant lab``: comparisons with paired seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sextant.cli.frame import verb

app = verb(no_args_is_help=True)


@app.callback()
def lab() -> None:
    """Experiments with paired seeds."""


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RECIPE_OR_RUN...", help="The last is the control.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for runs, table and plot.")],
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0.", min=1)] = 3,
    settings: Annotated[list[str] | None, typer.Option("--set", help="path=value for every run.")] = None,
) -> None:
    """Train every run at every seed on the same data order, and compare held-out bits per byte."""
    from sextant.cli.runs import resolve
    from sextant.lab import paired
    from sextant.train.loop import to_stderr

    chosen = [resolve(what, "twin", settings or [])[0] for what in runs]
    arms = paired.compare(chosen, range(seeds), out, to_stderr)
    typer.echo(paired.table(arms))
