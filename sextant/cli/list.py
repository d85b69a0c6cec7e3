"""``sextant list``: what can be chosen, read from the tables that the code itself uses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sextant.cli.frame import verb

if TYPE_CHECKING:
    from rich.table import Table as View

    from sextant.core.table import Row, Table

app = verb()

EVERY_COLUMN = 100
"""Terminals at least this wide also see the source beside each line."""


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(metavar="[recipes|AXIS]", help="recipes, or an axis; all when left out.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Recipes, and the options of every axis."""
    from sextant.core.errors import UsageError, nearest

    known = ["recipes", *tables()]
    if what and what not in known:
        raise UsageError("no such list", got=f"'{what}'", fix=nearest(what, known))
    chosen = [what] if what else known
    found = {name: recipes() if name == "recipes" else options(tables()[name]) for name in chosen}
    if as_json:
        import json

        typer.echo(json.dumps(found[what] if what else found, indent=1))
        return
    from sextant.cli.frame import console

    out = console()
    for name in chosen:
        wide = out.width >= EVERY_COLUMN
        out.print(_recipes_view(found[name], wide) if name == "recipes" else _options_view(tables()[name], wide))
        out.print()


def tables() -> dict[str, Table]:
    """Every axis table by the name that ``sextant list`` takes."""
    from sextant.axes import attention, capacity, kv, numerics, routing, stability

    every = (
        attention.TABLE, kv.TABLE, kv.POSITIONS, capacity.TABLE, routing.TABLE, routing.OVERFLOW, routing.BALANCE,
        stability.TABLE, stability.NORMS, stability.INITS, numerics.TABLE,
    )
    return {table.axis: table for table in every}


def options(table: Table) -> list[dict[str, Any]]:
    """The rows of one axis as plain data; a field without ``default`` has to be given."""
    return [
        {"name": row.name, "line": row.line, "source": row.source, "fields": fields(row)} for row in table
    ]


def fields(row: Row) -> dict[str, dict[str, Any]]:
    """Type and default of each field of an option."""
    found = {}
    for name, schema in row.spec.model_json_schema()["properties"].items():
        if name != "kind":
            found[name] = {key: schema[key] for key in ("type", "enum", "default", "description") if key in schema}
    return found


def recipes() -> list[dict[str, Any]]:
    """The recipes as plain data, sizes counted from their declarations."""
    from sextant import recipes
    from sextant.core.cost import At

    found = []
    for name in recipes.names():
        recipe = recipes.get(name)
        model, twin = recipe.paper().model, recipe.twin().model
        cost, small = model.cost(At(model.context)), twin.cost(At(twin.context))
        found.append({
            "name": name, "line": recipe.line, "source": recipe.source, "params": cost.params,
            "active_params": cost.active_params, "context": model.context, "layers": len(model.layers),
            "twin_params": small.params, "twin_active_params": small.active_params,
        })
    return found


def _recipes_view(found: list[dict[str, Any]], wide: bool) -> View:
    from rich.table import Table as View

    from sextant.core.units import count

    view = View(title="recipes: published systems, and ours", title_justify="left", box=None, pad_edge=False)
    view.add_column("name", no_wrap=True)
    for name in ("params", "active", "context", "twin"):
        view.add_column(name, justify="right", no_wrap=True)
    view.add_column("what sets it apart")
    if wide:
        view.add_column("source")
    for row in found:
        view.add_row(
            row["name"], _short(row["params"]), _short(row["active_params"]), count(row["context"], 0).replace(" ", ""),
            _short(row["twin_params"]), row["line"], *([row["source"]] if wide else []),
        )
    return view


def _short(n: int) -> str:
    """``962B``, ``34.7B``, ``1.9M``: three digits are enough in a list."""
    from sextant.core.units import count

    number, unit = count(float(f"{n:.3g}"), 1).split(" ")
    return f"{float(number):.{0 if float(number) >= 100 else 1}f}{unit}"


def _options_view(table: Table, wide: bool) -> View:
    from rich.table import Table as View

    view = View(title=f"{table.axis}: {table.question}", title_justify="left", box=None, pad_edge=False)
    view.add_column("kind", no_wrap=True)
    view.add_column("what it does")
    view.add_column("fields")
    if wide:
        view.add_column("source")
    for row in table:
        cells = [row.name, row.line, ", ".join(f"{name}{_default(field)}" for name, field in fields(row).items())]
        view.add_row(*cells, *([row.source] if wide else []))
    return view


def _default(field: dict[str, Any]) -> str:
    default = field.get("default", ...)
    if default is ...:
        return ""
    return f"={default['kind']}" if isinstance(default, dict) and "kind" in default else f"={default}"
