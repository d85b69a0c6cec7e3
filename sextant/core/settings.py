"""Settings by path, as ``--set optimiser.lr=1e-3`` gives them: what a path leads to, and who said what.

They change what a declaration was *given*, not its defaults, so that a default stays one. A new ``kind`` keeps the keys
that both kinds have and drops the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Self, Union, get_args, get_origin

from pydantic import BaseModel

from sextant.core.errors import UsageError, closest, nearest
from sextant.core.plain import leaves, parse_value

_STEP = re.compile(r"[^.\[\]]+|\[[^\]]*\]")
_PATH = re.compile(r"[^.\[\]]+(\.[^.\[\]]+|\[(\*|-?\d{1,9})\])*")


@dataclass(frozen=True)
class Setting:
    """``path=text``, and who says so: ``--set``, a flag, the environment."""

    path: str
    text: str
    source: str = "--set"

    @classmethod
    def read(cls, assignment: str, source: str = "--set") -> Self:
        """From ``path=value``.

        Raises:
            UsageError: it has another form.
        """
        path, equals, text = assignment.partition("=")
        if not equals or not _PATH.fullmatch(path.strip()):
            raise UsageError(f"{source} needs path=value", got=repr(assignment), expected="such as optimiser.lr=1e-3")
        return cls(path.strip(), text, source)


def given(value: Any) -> Any:
    """Plain data of a declaration without what nobody gave it; kinds always."""
    if isinstance(value, BaseModel):
        names = (name for name in type(value).model_fields if name in value.model_fields_set or name == "kind")
        return {name: given(getattr(value, name)) for name in names}
    return [given(item) for item in value] if isinstance(value, tuple | list) else value


def assigned(spec: BaseModel, settings: Iterable[Setting]) -> tuple[dict[str, Any], dict[str, str]]:
    """What a declaration was given, with the settings put in; ``[*]`` reaches every element that has the field.

    Returns:
        The data, to be validated; and the paths that were set, leaves and what holds them, each with its source.

    Raises:
        UsageError: a path leads nowhere, or to an unknown kind.
    """
    data, said = given(spec), {}
    for setting in settings:
        for place in _reached(_Place({"": data}, "", (type(spec),), ""), setting, spec):
            place.put(setting)
            said |= dict.fromkeys([place.path, *dict(leaves(place.value, place.path))], setting.source)
    return data, said


def blamed(path: str, said: Mapping[str, str]) -> str:
    """The sources of what was set at a path, inside it or around it; all where it is none of them."""
    near = [source for where, source in said.items() if _meet(where.removesuffix(".kind"), path)]
    return " and ".join(dict.fromkeys(near or said.values()))


def _meet(one: str, other: str) -> bool:
    short, long = sorted((one, other), key=len)
    return not short or long == short or long.startswith((f"{short}.", f"{short}["))


@dataclass
class _Place:
    """Somewhere in given data: what holds it, under which key, the types it may have, and its path."""

    holder: Any
    key: Any
    types: tuple[Any, ...]
    path: str
    owner: _Place | None = None
    default: Any = None

    @property
    def value(self) -> Any:
        """What stands here; a default that nobody gave is written out, so that a part of it can be set."""
        if isinstance(self.holder, dict):
            return self.holder.setdefault(self.key, given(self.default))
        return self.holder[self.key]

    @property
    def kinds(self) -> list[type[BaseModel]]:
        return [kind for kind in self.types if isinstance(kind, type) and issubclass(kind, BaseModel)]

    @property
    def declaration(self) -> type[BaseModel] | None:
        """The declaration that the data here is of."""
        if not isinstance(self.value, dict):
            return None
        if len(self.kinds) == 1:
            return self.kinds[0]
        return next((kind for kind in self.kinds if _kind(kind) == self.value.get("kind")), None)

    def known(self) -> list[str]:
        """Steps from here."""
        if isinstance(self.value, list):
            return [f"[0] to [{len(self.value) - 1}]"] if self.value else []
        return list(self.declaration.model_fields) if self.declaration else []

    def inside(self, step: str) -> list[_Place]:
        """Where a step leads from here; nowhere if there is no such thing."""
        if isinstance(self.value, list) and step.startswith("["):
            wanted = range(len(self.value)) if step == "[*]" else [int(step[1:-1])]
            return [self._item(index % len(self.value)) for index in wanted if index in self._indices]
        if self.declaration is None or step not in self.declaration.model_fields:
            return []
        field = self.declaration.model_fields[step]
        default = field.get_default(call_default_factory=True)
        return [_Place(self.value, step, _options(field.annotation), f"{self.path}.{step}".lstrip("."), self, default)]

    @property
    def _indices(self) -> range:
        return range(-len(self.value), len(self.value))

    def _item(self, index: int) -> _Place:
        items = [get_args(kind)[0] for kind in self.types if get_origin(kind) is tuple]
        types = tuple(option for item in items for option in _options(item))
        return _Place(self.value, index, types, f"{self.path}[{index}]")

    def put(self, setting: Setting) -> None:
        """Set what stands here.

        Raises:
            UsageError: an unknown kind.
        """
        value = _read(setting.text, self.types)
        if self.key == "kind" and self.owner is not None:
            self.owner._become(value, setting)
        self.holder[self.key] = value

    def _become(self, kind: Any, setting: Setting) -> None:
        """Drop the keys that another kind does not have."""
        kinds = {_kind(declaration): declaration for declaration in self.kinds}
        if not isinstance(kind, str) or kind not in kinds:
            where = f"{setting.source} {setting.path}"
            raise UsageError("unknown kind", where=where, got=kind, fix=nearest(str(kind), kinds))
        for name in [name for name in self.value if name not in kinds[kind].model_fields]:
            del self.value[name]


def _kind(declaration: type[BaseModel]) -> str:
    return str(declaration.model_fields["kind"].default)


def _options(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows: unions taken apart, other things as they are."""
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(option for part in get_args(annotation) for option in _options(part))
    return (annotation,)


def _read(text: str, types: tuple[Any, ...]) -> Any:
    """The value of a field of these types. Text is taken as typed, unless it is one quoted YAML text."""
    value = parse_value(text)
    if str not in types or (value is None and NoneType in types):
        return value
    quoted = isinstance(value, str) and len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return value if quoted else text


def _reached(root: _Place, setting: Setting, spec: BaseModel) -> list[_Place]:
    places = [root]
    for step in _STEP.findall(setting.path):
        inner = [place for outer in places for place in outer.inside(step)]
        if not inner:
            known = {name for place in places for name in place.known()}
            fix = _remedy(step, known, setting.path, spec)
            raise UsageError("no such setting", where=f"{setting.source} {setting.path}", got=step, fix=fix)
        places = inner
    return places


def _remedy(step: str, known: Iterable[str], path: str, spec: BaseModel) -> str:
    """A name that is close here, the same name elsewhere, or the names that are known here."""
    name = [step for step in _STEP.findall(path) if not step.startswith("[")][-1]
    is_here = step.startswith("[") or closest(step, known)
    if not is_here and (elsewhere := _elsewhere(name, spec) or _elsewhere(step, spec)):
        return f"Did you mean {' or '.join(map(repr, elsewhere[:2]))}?"
    return nearest(step, known) if known else "It has no settings of its own: give it as a whole"


def _elsewhere(name: str, spec: BaseModel) -> list[str]:
    """Paths that end in a name, the shortest first, with ``[*]`` for the elements of a list."""
    found = set()
    for path, _ in leaves(spec.model_dump(mode="json")):
        steps = re.sub(r"\[\d+\]", "[*]", path).split(".")
        found |= {".".join(steps[: place + 1]) for place, step in enumerate(steps) if step == name}
    return sorted(found, key=lambda path: (path.count("."), path))
