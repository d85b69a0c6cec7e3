"""Declarations: small frozen records that are validated strictly, round-trip through YAML, and say what is wrong where.

Every option of every axis, every model and every run is a :class:`Spec`. Unknown keys are refused with the nearest
known one; an error carries the path of the field, such as ``model.layers[3].attention.window``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from sextant.core.errors import UsageError, nearest
from sextant.core.plain import leaves, read_yaml, write_yaml
from sextant.core.settings import Setting, assigned, blamed

LARGEST_INT, LARGEST_FLOAT = 2**63 - 1, 3.4e38
"""What an integer and an fp32 number of a machine can hold."""


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
                fix = nearest(str(key), cls.model_fields)
                raise PydanticCustomError("unknown_key", "unknown key", {"key": str(key), "fix": fix})
        return {key: _tuples(value) for key, value in data.items()}

    @field_validator("*")
    @classmethod
    def _fits_the_machine(cls, value: Any) -> Any:
        for number in _numbers(value):
            most = LARGEST_INT if isinstance(number, int) else LARGEST_FLOAT
            if not -most - 1 <= number <= most:
                held = "64 bits hold" if isinstance(number, int) else "fp32 holds, at most 3.4e38"
                raise PydanticCustomError("too_large", "too large", {"expected": f"what {held}"})
        return value

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
        except UsageError as error:  # a part has a language of its own, such as layer schedules
            raise error.within(source) from None

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
        return write_yaml(self.to_dict())

    def replace(self, **changes: Any) -> Self:
        """A copy with fields replaced, validated again; what nobody gave stays a default."""
        kept = {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}
        return type(self).parse({**kept, **changes})

    def override(self, *assignments: str) -> Self:
        """A copy with ``path=value`` assignments applied, as ``--set`` gives them; ``layers[*]`` means every layer.

        Raises:
            UsageError: no such path, or a value the field does not take.
        """
        return self.with_settings([Setting.read(assignment) for assignment in assignments])[0]

    def with_settings(self, settings: Sequence[Setting]) -> tuple[Self, dict[str, str]]:
        """A copy with settings applied, the last one winning; and who set which path.

        Raises:
            UsageError: no such path, or a value the field does not take, with the source of the setting.
        """
        data, said = assigned(self, settings)
        try:
            return type(self).parse(data), said
        except UsageError as error:
            raise error.within(blamed(error.where, said)) from None

    def leaves(self) -> dict[str, Any]:
        """Every scalar by its path: ``{"model.width": 128, ...}``."""
        return dict(leaves(self.to_dict()))


def _tuples(value: Any) -> Any:
    """Lists of files become tuples of declarations, at any depth."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _numbers(value: Any) -> Iterator[int | float]:
    """The numbers of a field, also those in tuples."""
    if isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value


EXPECTED = {
    "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "finite_number": "a finite number", "bool_type": "true or false", "string_type": "text", "tuple_type": "a list",
    "model_type": "a mapping of keys to values", "model_attributes_type": "a mapping of keys to values",
    "greater_than": "more than {gt}", "greater_than_equal": "at least {ge}", "less_than": "less than {lt}",
    "less_than_equal": "at most {le}", "too_short": "at least {min_length} items",
    "too_long": "at most {max_length} items", "literal_error": "{expected}", "too_large": "{expected}",
}  # fmt: skip
"""What a field takes, by pydantic's name of the problem."""


def explain(error: ValidationError, data: Any, source: str = "") -> UsageError:
    """The first problem of a validation as one line: path, what was found, what would do."""
    first = error.errors(include_url=False)[0]
    kind, context, got, fix = first["type"], first.get("ctx", {}), first["input"], ""
    path, what = _path(first["loc"], data), first["msg"].removeprefix("Value error, ")
    expected = EXPECTED.get(kind, "").format(**context)
    if expected:
        what, got = "wrong value", _short(got)
    elif "key" in context:
        path, got, fix = f"{path}.{context['key']}", context.get("got", ""), context.get("fix", "")
        expected = context.get("expected", "")
    elif kind == "union_tag_invalid":
        tags = [tag.strip(" '") for tag in str(context["expected_tags"]).split(",")]
        path, what, got = f"{path}.kind", "unknown kind", context["tag"]
        fix = nearest(str(got), tags)
    elif kind in ("missing", "union_tag_not_found"):
        path, what, got, fix = path + ".kind" * (kind != "missing"), "missing key", "", "Give it a value"
    else:  # a rule between fields, which says their values itself
        got = "" if isinstance(got, Mapping | BaseModel) else _short(got)
    where = " ".join(filter(None, [source, path.lstrip(".")]))
    return UsageError(what, where=where, got=got, expected=expected, fix=fix)


def _short(value: Any) -> str:
    text = json.dumps(value, default=repr, ensure_ascii=False)
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
