"""From what a person names to a run: recipe or file, settings from the environment and the command line, origins."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence

import torch

from sextant import recipes
from sextant.core.errors import EnvironmentFault, UsageError
from sextant.core.plain import leaves, write_value
from sextant.core.settings import Setting, given
from sextant.train.run import Run

ENVIRONMENT = "SEXTANT_SET"


def resolve(
    what: str, size: str, settings: Sequence[str], flags: Mapping[str, tuple[str, object]] | None = None
) -> tuple[Run, dict[str, str]]:
    """The run, and where each of its settings comes from.

    Later wins: default, recipe or file, ``SEXTANT_SET`` (assignments separated by semicolons), flags, ``--set``.

    Args:
        flags: path and value by the flag's name; those that are None were not given.

    Raises:
        UsageError: no such recipe or file, or a setting that does not fit.
    """
    named, origin = _named(what, size)
    from_environment = [item for item in os.environ.get(ENVIRONMENT, "").split(";") if item.strip()]
    run, said = named.with_settings([
        *(Setting.read(item, f"env {ENVIRONMENT}") for item in from_environment),
        *(Setting(path, str(value), flag) for flag, (path, value) in (flags or {}).items() if value is not None),
        *map(Setting.read, settings),
    ])
    return run, _origins(named, origin, run, said)


def _origins(named: Run, origin: str, run: Run, said: Mapping[str, str]) -> dict[str, str]:
    """Where each leaf of the run comes from: who set its path, else what was named if it gave it, else the default."""
    before, was_given, is_given = named.leaves(), dict(leaves(given(named))), dict(leaves(given(run)))

    def of(path: str, value: object) -> str:
        if path not in is_given:
            return "default"
        if path in said:
            return said[path]
        if path in was_given and before[path] == value:
            return origin
        return said.get("model.schedule", "default")  # a schedule sets attention layer by layer

    return {path: of(path, value) for path, value in run.leaves().items()}


def config_lines(run: Run, origins: Mapping[str, str]) -> Iterator[str]:
    """Every setting as ``--set`` takes it, and where it comes from."""
    for path, value in run.leaves().items():
        yield f"{path}={write_value(value)}    # {origins[path]}"


def _named(what: str, size: str) -> tuple[Run, str]:
    if what.endswith((".yaml", ".yml", ".json")) or os.sep in what:
        return Run.load(what), what
    recipe = recipes.get(what)
    if size not in ("twin", "paper"):
        raise UsageError("no such size", where="--size", got=size, expected="twin or paper")
    return (recipe.paper() if size == "paper" else recipe.twin()), f"recipe {what}"


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


