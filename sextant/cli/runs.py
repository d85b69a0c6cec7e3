"""From what a person names to a run: recipe or file, settings from the environment and the command line, origins."""

from __future__ import annotations

import os
import re

import torch

from sextant import recipes
from sextant.core.errors import EnvironmentFault, UsageError
from sextant.train.run import Run

ENVIRONMENT = "SEXTANT_SET"


def resolve(what: str, size: str, settings: list[str]) -> tuple[Run, dict[str, str]]:
    """The run, and where each of its settings comes from.

    Later wins: default, recipe or file, ``SEXTANT_SET`` (assignments separated by semicolons), command line.

    Raises:
        UsageError: no such recipe or file, or a setting that does not fit.
    """
    run, origin = _named(what, size)
    origins = {path: origin if value != _defaults().get(path) else "default" for path, value in run.leaves().items()}
    from_environment = [item for item in os.environ.get(ENVIRONMENT, "").split(";") if item.strip()]
    for source, assignments in ((ENVIRONMENT, from_environment), ("command line", settings)):
        before = run.leaves()
        run = run.override(*assignments)
        origins = {p: source if p not in before or before[p] != v else origins[p] for p, v in run.leaves().items()}
    return run, origins


def _named(what: str, size: str) -> tuple[Run, str]:
    if what.endswith((".yaml", ".yml", ".json")) or os.sep in what:
        return Run.load(what), what
    recipe = recipes.get(what)
    if size not in ("twin", "paper"):
        raise UsageError("no such size", where="--size", got=size, expected="twin or paper")
    return (recipe.paper() if size == "paper" else recipe.twin()), f"recipe {what}"


def _defaults() -> dict[str, object]:
    """Values of fields that the smallest possible declaration leaves alone."""
    fields = Run.model_fields
    plain = {name: field.default for name, field in fields.items() if not field.is_required()}
    leaves: dict[str, object] = {}
    for name, value in plain.items():
        if hasattr(value, "leaves"):
            leaves |= {f"{name}.{path}": leaf for path, leaf in value.leaves().items()}
        else:
            leaves[name] = value
    return leaves


def pick_device(name: str) -> torch.device:
    """The one reading of ``--device``: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``, a GPU when there is one.

    Raises:
        EnvironmentFault: the device asked for is not here.
        UsageError: not a device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = re.fullmatch(r"cpu|cuda(?::(0|[1-9][0-9]*))?", name)
    if not known:
        raise UsageError("no such device", where="--device", got=name, expected="cpu, cuda, cuda:N or auto")
    if name != "cpu" and int(known[1] or 0) >= torch.cuda.device_count():
        raise EnvironmentFault("no CUDA device here", where="--device", got=name, fix="Use --device cpu")
    return torch.device(name)


