"""``sextant audit``: tensor, dtype, reason, read off a real step; exit code 5 where the policy is broken."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sextant.cli.frame import verb

if TYPE_CHECKING:
    from rich.table import Table as View

    from sextant.axes.numerics.audit import Line

app = verb()


@app.command()
def audit(
    what: Annotated[str, typer.Argument(metavar="RECIPE_OR_RUN", help="A recipe's name, a run file or a run folder.")],
    numerics: Annotated[str | None, typer.Option(help="A policy in place of the run's: sextant list numerics.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="path=value, as often as needed.")] = None,
    size: Annotated[str, typer.Option(help="twin (two CPU cores) or paper.")] = "twin",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Which tensor is in which dtype and why, read off one real training step from fresh weights."""
    import json

    from sextant.cli.frame import console
    from sextant.cli.runs import pick_device, resolve
    from sextant.train.audit import audit as read
    from sextant.train.audit import require

    where = pick_device(device)
    source = str(Path(what) / "config.yaml") if Path(what).is_dir() else what
    run, _ = resolve(source, size, settings or [], {"--numerics": ("numerics.kind", numerics)})
    lines = read(run, run.model.build(run.numerics, device=where, seed=run.seed))
    if as_json:
        facts = {"name": run.name, "numerics": run.numerics.to_dict(), "device": str(where)}
        typer.echo(json.dumps({**facts, "tensors": [vars(line) for line in lines]}, indent=1))
    else:
        out = console()
        out.print(f"{run.name}, {run.numerics.kind} on {where}: one step of random tokens", style="bold")
        out.print(_view(lines))
    require(lines)


def _view(lines: list[Line]) -> View:
    from rich.table import Table as View

    view = View(box=None, pad_edge=False)
    for name in ("tensor", "dtype", "policy", "reason"):
        view.add_column(name)
    for line in lines:
        met = ", ".join(line.met) or "none here"
        view.add_row(line.tensor, met, line.declared, line.reason, style="bold red" if line.broken else "")
    return view
