"""Declarations: small frozen records that are validated strictly, round-trip through YAML, and say what is wrong where.

Every option of every axis, every model and every run is a :class:`Spec`. Unknown keys are refused with the nearest
known one; an error carries the path of the field, such as ``model.layers[3].attention.window``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from sextant.core.errors import UsageError, nearest
from sextant.core.units import parse_size


class Spec(BaseModel):
    """A frozen declaration. Subclasses add fields, ``build()`` and ``cost()``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys_and_tuples(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        for key in data:
            if key not in cls.model_fields:
                hint = nearest(str(key), cls.model_fields)
                raise PydanticCustomError("unknown_key", "unknown key", {"key": str(key), "hint": hint})
        return {key: _tuples(value) for key, value in data.items()}

    @classmethod
    def parse(cls, data: Any, source: str = "") -> Self:
        """Validate plain data (from YAML, JSON or a dict).

        Raises:
            UsageError: the first problem, with its path, what was found and what to do.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise explain(error, data, source) from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a YAML or JSON file written by :meth:`save` or by hand."""
        return cls.parse(read_yaml(path), source=str(path))

    def save(self, path: str | Path) -> None:
        """Write YAML; equal parts are written once and referred to, so that 78 layers stay readable."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """Plain data: only dicts, lists, numbers, strings, booleans and None."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Lossless YAML text; ``Spec.parse(yaml)`` gives an equal record."""
        return yaml.dump(_share_equal(self.to_dict(), {}), Dumper=yaml.SafeDumper, sort_keys=False, width=120)

    def replace(self, **changes: Any) -> Self:
        """A copy with fields replaced, validated again."""
        return type(self).parse({**{name: getattr(self, name) for name in type(self).model_fields}, **changes})

    def override(self, *assignments: str) -> Self:
        """A copy with ``path=value`` assignments applied, as ``--set`` gives them; ``layers[*]`` means every layer.

        Raises:
            UsageError: no such path, or a value the field does not take.
        """
        data = self.to_dict()
        for assignment in assignments:
            path, equals, text = assignment.partition("=")
            if not equals:
                raise UsageError("--set needs path=value", got=repr(assignment))
            assign(data, path.strip(), parse_value(text))
        return type(self).parse(data, source="--set")

    def leaves(self) -> dict[str, Any]:
        """Every scalar by its path: ``{"model.width": 128, ...}``."""
        return dict(_leaves(self.to_dict(), ""))


def _tuples(value: Any) -> Any:
    """Lists of files become tuples of declarations, at any depth."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def parse_value(text: str) -> Any:
    """The value of a ``--set``: YAML, with sizes such as ``32k`` understood as whole numbers."""
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text
    if isinstance(value, str) and re.fullmatch(r"\d[\d_.]*(k|m|b|t|K|Ki|Mi|Gi)", value):
        return parse_size(value)
    return value


def assign(data: Any, path: str, value: Any) -> None:
    """Set ``path`` in nested plain data; ``[*]`` reaches every element that has the field.

    Raises:
        UsageError: the path leads nowhere.
    """
    steps = [step for step in re.split(r"\.|(\[[^\]]*\])", path) if step]
    places: list[Any] = [data]
    for step in steps[:-1]:
        places = [inner for place in places for inner in _children(place, step, path)]
    reached = [place for place in places if _has(place, steps[-1])]
    if not reached:
        known = sorted({key for place in places if isinstance(place, dict) for key in place})
        raise UsageError("no such setting", where=path, fix=nearest(steps[-1], known) if known else "")
    for place in reached:
        place[steps[-1] if isinstance(place, dict) else _index(steps[-1])] = value


def _index(step: str) -> int:
    return int(step[1:-1])


def _has(place: Any, step: str) -> bool:
    if isinstance(place, dict):
        return step in place
    is_index = isinstance(place, list) and re.fullmatch(r"\[-?\d+\]", step)
    return bool(is_index) and -len(place) <= _index(step) < len(place)


def _children(place: Any, step: str, path: str) -> list[Any]:
    if step == "[*]" and isinstance(place, list):
        return place
    if _has(place, step):
        return [place[step] if isinstance(place, dict) else place[_index(step)]]
    known = place if isinstance(place, dict) else [f"[0] to [{len(place) - 1}]"] if isinstance(place, list) else []
    raise UsageError("no such setting", where=path, got=step, fix=nearest(step, [str(key) for key in known]))


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: ``1e-4`` is a number, and a key written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                problem = f"key '{key}' is written twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: str | Path) -> Any:
    """Plain data from a YAML or JSON file.

    Raises:
        UsageError: no such file, not text, or not YAML; with the line where it goes wrong.
    """
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UsageError("cannot read", where=path, got=error.strerror or error) from None
    except UnicodeDecodeError as error:
        raise UsageError("not UTF-8 text", where=path, got=f"byte {error.start}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UsageError("not valid YAML", where=line, got=getattr(error, "problem", None) or error) from None


def explain(error: ValidationError, data: Any, source: str = "") -> UsageError:
    """The first problem of a validation as one line: path, what was found, what would do."""
    first = error.errors(include_url=False)[0]
    path = _path(first["loc"], data)
    context = first.get("ctx", {})
    if first["type"] == "unknown_key":
        path, what, got, fix = f"{path}.{context['key']}".lstrip("."), "unknown key", "", context["hint"]
    elif first["type"] == "union_tag_invalid":
        tags = [tag.strip(" '") for tag in str(context["expected_tags"]).split(",")]
        path, what, got, fix = f"{path}.kind", "unknown kind", context["tag"], nearest(str(context["tag"]), tags)
    elif first["type"] == "missing":
        what, got, fix = "missing key", "", "Give it a value"
    else:
        what, got, fix = first["msg"].removeprefix("Value error, "), _short(first["input"]), ""
    return UsageError(what, where=" ".join(filter(None, [source, path])), got=got, fix=fix)


def _short(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def _path(loc: Sequence[str | int], data: Any) -> str:
    """``layers[3].attention.window``: the location, less the union tags that pydantic puts in.

    A tag follows the field of a union, so never comes first nor twice; a field may have the name of its own kind.
    """
    path, may_be_tag = "", False
    for step in loc:
        kind = data.get("kind") if isinstance(data, Mapping) else getattr(data, "kind", None)
        if may_be_tag and step == kind:
            may_be_tag = False
            continue
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
        data, may_be_tag = _step_into(data, step), True
    return path.lstrip(".")


def _step_into(data: Any, step: str | int) -> Any:
    try:
        return getattr(data, str(step)) if isinstance(data, BaseModel) else data[step]
    except (KeyError, IndexError, TypeError, AttributeError):
        return None


def _leaves(data: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _leaves(value, f"{path}.{key}" if path else key)
    elif isinstance(data, list) and any(isinstance(item, dict | list) for item in data):
        for index, value in enumerate(data):
            yield from _leaves(value, f"{path}[{index}]")
    else:
        yield path, data


def _share_equal(data: Any, seen: dict[str, Any]) -> Any:
    """The same data with equal dicts made one object, which the YAML writer turns into anchors and references."""
    if isinstance(data, list):
        return [_share_equal(item, seen) for item in data]
    if not isinstance(data, dict):
        return data
    shared = {key: _share_equal(value, seen) for key, value in data.items()}
    return seen.setdefault(json.dumps(data), shared) if len(data) > 1 else shared
