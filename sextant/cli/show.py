"""``sextant show``: a recipe or run file as numbers, counted from its declaration without building the model."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sextant.cli.frame import verb

if TYPE_CHECKING:
    from rich.table import Table as View

    from sextant.core.cost import At, Cost
    from sextant.core.spec import Spec
    from sextant.model.spec import Layer, ModelSpec
    from sextant.train.run import Run

app = verb()

ACTIVE = "what one token meets: embedding and head included, of the experts only the chosen"


@app.command()
def show(
    what: Annotated[str, typer.Argument(metavar="RECIPE_OR_FILE", help="A recipe's name, or a run file.")] = "",
    size: Annotated[str, typer.Option(help="paper or twin.")] = "paper",
    at: Annotated[str, typer.Option(help="Tokens to average FLOPs over, such as 16k; default the context.")] = "",
    settings: Annotated[list[str] | None, typer.Option("--set", help="path=value, as often as needed.")] = None,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="The whole run as YAML, ready for `sextant train`.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="JSON schema of run files, and nothing else.")] = False,
) -> None:
    """A recipe or run file: layers, parameters, FLOPs, decoding state."""
    import json

    from sextant.cli.frame import console
    from sextant.cli.runs import resolve
    from sextant.core.errors import UsageError
    from sextant.core.units import count, parse_size
    from sextant.train.run import Run

    if schema:
        typer.echo(json.dumps(Run.model_json_schema(), indent=1))
        return
    if not what:
        raise UsageError("missing argument 'RECIPE_OR_FILE'", fix="See 'sextant list recipes'")
    run, _ = resolve(what, size, settings or [])
    if as_yaml:
        typer.echo(run.to_yaml(), nl=False)
        return
    length = parse_size(at) if at else run.model.context
    if length < 1:
        raise UsageError("no such length", where="--at", got=at, expected="1 or more tokens")
    facts = describe(run, length)
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    out = console()
    title = f"{facts['name']}: {count(facts['params'])} parameters, {count(facts['active_params'])} active"
    state = f"decoding state of one sequence, {facts['itemsize']} bytes an element"
    out.print(title, style="bold")
    out.print(_head_view(run, facts))
    out.print(f"\nper part, FLOPs at {facts['at']:,} tokens", style="bold")
    out.print(_parts_view(facts))
    out.print(f"\n{state}", style="bold")
    out.print(_state_view(facts))
    out.print(f"\nactive: {ACTIVE}", style="dim")


def describe(run: Run, tokens: int) -> dict[str, Any]:
    """All facts of ``sextant show`` as plain data; FLOPs are a mean over ``tokens`` positions."""
    from sextant.core.cost import At

    model, itemsize = run.model, run.numerics.itemsize
    at = At(tokens, itemsize)
    cost, further = model.cost(at), model.mtp_cost(at)
    lengths = sorted({1024, 8192, 32_768, model.context // 4, model.context, tokens} - {0})
    return {
        "name": model.name, "context": model.context, "vocab": model.vocab, "width": model.width, "tied": model.tied,
        "layers": len(model.layers), "params": cost.params, "active_params": cost.active_params, "active": ACTIVE,
        "extra_params": extra_params(model), "mtp_params": further.params, "mtp_flops_per_token": further.flops,
        "at": tokens, "flops_per_token": cost.flops, "itemsize": itemsize,
        "parts": {
            name: {"params": part.params, "active_params": part.active_params, "flops_per_token": part.flops}
            for name, part in parts(model, at).items()
        },
        "state_bytes": {
            str(n): model.cost(At(n, itemsize)).state_bytes for n in lengths if n <= max(model.context, tokens)
        },
        "columns": {name: column(model, name) for name in ("attention", "kv", "feed_forward", "residual")},
    }


def extra_params(model: ModelSpec) -> int | None:
    """Parameters that attention patterns add to a dense model's: with 0 its weights load as they are (spec
    sparse-attention 2, L4). None where a mixer replaces attention, so that there is no such model.
    """
    from sextant.axes.attention import Pattern
    from sextant.core.cost import At

    costs = [
        layer.attention.cost(model.width, layer.projections, At(1)).params
        for layer in model.layers if isinstance(layer.attention, Pattern)
    ]
    return sum(costs) if len(costs) == len(model.layers) else None


def parts(model: ModelSpec, at: At) -> dict[str, Cost]:
    """The model's cost by part; the parts add up to ``model.cost(at)``."""
    from sextant.core.cost import Cost

    table = model.vocab * model.width
    found = {"embedding": Cost(table, table), "head": Cost.of_matrix(model.width, model.vocab, at)}
    if model.tied:  # one matrix, counted where it is looked up, working where it multiplies
        found["head"] = minus(found["head"], Cost(table, table))
    for layer in model.layers:
        for name, cost in _layer_parts(layer, model.width, at).items():
            found[name] = found.get(name, Cost()) + cost
    found["norms"] += model.final_norm.cost(model.width, at)
    return found


def _layer_parts(layer: Layer, width: int, at: At) -> dict[str, Cost]:
    from sextant.axes.capacity import Experts

    feed_forward = layer.feed_forward
    found = {
        "attention": layer.attention_cost(width, at),
        "norms": layer.residual.cost(width, at),
    }
    total = feed_forward.cost(width, at)
    if not isinstance(feed_forward, Experts):
        return {**found, "dense feed-forward": total}
    routed = feed_forward.expert_cost(getattr(feed_forward, "latent", width), at)
    shared = feed_forward.shared_cost(width, at)
    found["experts"] = routed
    if feed_forward.shared:
        found["shared experts"] = shared
    return {**found, "router, latent": minus(minus(total, routed), shared)}


def minus(a: Cost, b: Cost) -> Cost:
    """What is left of ``a`` without its part ``b``."""
    return a + -1 * b


def column(model: ModelSpec, axis: str) -> str:
    """One axis down the layers, as ``13 x (5 x window 512, 1 x full)``."""
    parts: list[Spec | None] = [getattr(layer, axis) for layer in model.layers]
    return pattern([_words(part, _ramps(parts)) for part in parts])


def _ramps(parts: list[Spec | None]) -> dict[tuple[str, str], str]:
    """Kind and field of numbers that go through many values over the layers, with the first and the last of them."""
    values: dict[tuple[str, str], list[float]] = {}
    for part in parts:
        for name in type(part).model_fields if part is not None else ():
            if isinstance(value := getattr(part, name), float):
                values.setdefault((str(getattr(part, "kind", "")), name), []).append(value)
    return {key: f"{run[0]:g} to {run[-1]:g}" for key, run in values.items() if len(set(run)) > 2}


def pattern(values: list[str]) -> str:
    """A list as its smallest repeating piece, each piece as runs of equal values."""
    period = next(p for p in range(1, len(values) + 1) if all(v == values[i % p] for i, v in enumerate(values)))
    times, rest = divmod(len(values), period)
    if period == 1 or times < 2:
        return _runs(values)
    text = f"{times} x ({_runs(values[:period])})"
    return f"{text}, then {_runs(values[-rest:])}" if rest else text


def _runs(values: list[str]) -> str:
    return ", ".join(f"{len(list(run))} x {value}" for value, run in groupby(values))


def _words(spec: Spec | None, ramps: Mapping[tuple[str, str], str] = MappingProxyType({})) -> str:
    """Kind, its parts, and the fields that were set: ``gqa heads 64 kv_heads 8 head_dim 128 position rope``."""
    if spec is None:  # a mixer projects by itself
        return "own"
    kind = str(getattr(spec, "kind", ""))
    words = [kind]
    for name, field in type(spec).model_fields.items():
        value = getattr(spec, name)
        if name != "kind" and (hasattr(value, "kind") or field.is_required() or value != field.default):
            words += [name] * (name != kind) + [ramps.get((kind, name)) or _word(value)] * (value is not True)
    return " ".join(words)


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_word, value)) + "]"
    return _words(value) if hasattr(value, "kind") else f"{value:g}" if isinstance(value, float) else str(value)


def _plain(*columns: str) -> View:
    from rich.table import Table as View

    view = View(box=None, pad_edge=False)
    view.add_column(columns[0])
    for name in columns[1:]:
        view.add_column(name, justify="right", no_wrap=True)
    return view


def _head_view(run: Run, facts: dict[str, Any]) -> View:
    from rich.table import Table as View

    from sextant.core.units import count

    view = View(box=None, pad_edge=False, show_header=False)
    view.add_column(no_wrap=True)
    view.add_column()
    view.add_row("layers", f"{facts['layers']}, width {facts['width']:,}, vocabulary {facts['vocab']:,}"
                 + (", tied head" if facts["tied"] else ""))
    view.add_row("context", f"{facts['context']:,} tokens")
    if facts["extra_params"] is not None:
        view.add_row("extra_params", f"{facts['extra_params']:,} on top of the same model with full attention")
    if facts["mtp_params"]:
        modules = f"{count(facts['mtp_params'])} more parameters, {count(facts['mtp_flops_per_token'])} FLOPs/token"
        view.add_row("prediction modules", f"{modules}; in training and for drafts")
    for name, text in facts["columns"].items():
        view.add_row(name.replace("_", "-"), text)
    view.add_row("numerics", run.numerics.kind)
    return view


def _parts_view(facts: dict[str, Any]) -> View:
    from sextant.core.units import count

    view = _plain("part", "parameters", "active", "FLOPs/token")
    for name, part in facts["parts"].items():
        view.add_row(name, count(part["params"]), count(part["active_params"]), count(part["flops_per_token"]))
    view.add_row("total", count(facts["params"]), count(facts["active_params"]), count(facts["flops_per_token"]),
                 style="bold")
    return view


def _state_view(facts: dict[str, Any]) -> View:
    from sextant.core.units import size

    view = _plain("tokens", "bytes", "bytes/token")
    for tokens, nbytes in facts["state_bytes"].items():
        view.add_row(f"{int(tokens):,}", size(nbytes), size(nbytes / int(tokens)))
    return view
