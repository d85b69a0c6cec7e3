"""Layer schedules as short text: ``(5*window512+1*full)*10``, ``29*moba(block=512,top_k=3),3*full``.

A schedule is a list of terms joined by ``,`` or ``+``; a term is a pattern or a list in brackets, with how often it
stands before or behind it. A pattern is a name that the caller gives, or a kind of axis 1: the number behind it is its
first field without a default, or its ``block`` or ``window``; settings stand in brackets. Spec sparse-attention 12.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from sextant.axes.attention import TABLE, Mixer, Pattern
from sextant.core.errors import UsageError, nearest
from sextant.core.plain import parse_value
from sextant.core.spec import Spec
from sextant.core.units import parse_size

AnyLayer = Pattern | Mixer
MOST = 10_000
"""Layers that a schedule may name, so that a slip of the finger does not fill the memory."""


def parse_schedule(text: str, names: Mapping[str, AnyLayer] | None = None) -> list[AnyLayer]:
    """The patterns of the layers, from the first on.

    Args:
        text: such as ``(5*window512+1*full)*10``.
        names: patterns by names of the caller's; they come before the kinds of axis 1.

    Raises:
        UsageError: with the place in the text (counted from 1), what stands there, and what would do.
    """
    reader = _Reader(text, dict(names or {}))
    layers = reader.many()
    if not reader.done():
        reader.refuse("a schedule ends too early", "',' or '+'")
    return layers


def scheduled(model: Any) -> Any:
    """Plain data of a model whose ``schedule``, if any, has moved into its layers; a linear mixer's layer loses its kv.

    Raises:
        UsageError: the schedule is not one, or does not fit the number of layers.
    """
    if not isinstance(model, Mapping) or not isinstance(text := model.get("schedule"), str):
        return model
    patterns, layers = parse_schedule(text), list(model.get("layers", ()))
    if len(patterns) != len(layers):
        facts = {"got": f"{len(patterns)} layers", "expected": len(layers)}
        raise UsageError("a schedule does not fit the model", where="schedule", **facts)
    return {**model, "schedule": None, "layers": tuple(map(_with, layers, patterns))}


def _with(layer: Any, pattern: AnyLayer) -> dict[str, Any]:
    own = {"attention": pattern, **({"kv": None} if isinstance(pattern, Mixer) else {})}
    return {**(dict(layer) if isinstance(layer, Spec | Mapping) else {}), **own}


@dataclass
class _Reader:
    """A cursor over the text, one method for each rule of the grammar."""

    text: str
    names: dict[str, AnyLayer]
    at: int = 0
    kinds: dict[str, Any] = field(default_factory=lambda: {row.name: row.spec for row in TABLE})

    def many(self) -> list[AnyLayer]:
        """Terms joined by ``,`` or ``+``."""
        layers = self.term()
        while self.take("[,+]"):
            layers = layers + self.term()
            self.bounded(len(layers))
        return layers

    def term(self) -> list[AnyLayer]:
        """``3*`` before, ``*3`` behind, or neither."""
        before = self.take(r"\d+\s*\*")
        layers = self.one()
        times = before or self.take(r"\*\s*\d+")
        while times:
            count = int(times.strip("* "))
            self.bounded(len(layers) * count)
            layers, times = layers * count, self.take(r"\*\s*\d+")
        return layers

    def one(self) -> list[AnyLayer]:
        """A pattern, or a list in brackets."""
        if not self.take(r"\("):
            return [self.pattern()]
        layers = self.many()
        if not self.take(r"\)"):
            self.refuse("a bracket is not closed", "')'")
        return layers

    def pattern(self) -> AnyLayer:
        """A name, or a kind with its number and settings."""
        start, name = self.at, self.take(r"[A-Za-z_][\w-]*")
        if name is None:
            self.refuse("no layer where one should be", "a pattern or '('")
        if name in self.names:
            return self.names[name]
        kind, number = _split(name, self.kinds)
        if kind not in self.kinds:
            self.at = start
            self.refuse("unknown pattern in a schedule", fix=nearest(kind, [*self.names, *self.kinds]))
        return self.made(start, kind, number)

    def made(self, start: int, kind: str, number: str) -> AnyLayer:
        """The declaration, whose own checks speak with the place in the text."""
        settings: dict[str, Any] = {"kind": kind}
        if number:
            settings[self.first_field(start, kind)] = parse_size(number)
        if inside := self.take(r"\([^()]*(\([^()]*\)[^()]*)*\)"):
            pairs = (pair.partition("=") for pair in re.split(r",(?![^\[]*\])", inside[1:-1]) if pair.strip())
            settings |= {key.strip(): parse_value(value.strip()) for key, _, value in pairs}
        try:
            return self.kinds[kind].parse(settings)
        except UsageError as error:
            self.at = start
            raise error.within(f"{self.place()}:") from None

    def first_field(self, start: int, kind: str) -> str:
        """The field that a number behind a kind sets."""
        fields = self.kinds[kind].model_fields
        required = [name for name, info in fields.items() if info.is_required()]
        found = [name for name in (*required, "block", "window") if name in fields]
        if not found:
            self.at = start
            self.refuse(f"{kind} takes no number behind it", kind)
        return found[0]

    def take(self, pattern: str) -> str | None:
        """What stands here, if it has this form; the cursor moves behind it."""
        match = re.compile(rf"\s*({pattern})\s*").match(self.text, self.at)
        if match is None:
            return None
        self.at = match.end()
        return match[1]

    def bounded(self, layers: int) -> None:
        if not 0 < layers <= MOST:
            raise UsageError(f"a schedule of {layers:,} layers", where=self.place(), expected=f"1 to {MOST:,}")

    def done(self) -> bool:
        return not self.text[self.at :].strip()

    def place(self) -> str:
        """``schedule at 4``."""
        return f"schedule at {self.at + 1}"

    def refuse(self, what: str, expected: str = "", fix: str = "") -> NoReturn:
        got = self.text[self.at : self.at + 16].strip()
        raise UsageError(what, where=self.place(), got=repr(got) if got else "the end", expected=expected, fix=fix)


def _split(name: str, kinds: Mapping[str, Any]) -> tuple[str, str]:
    """``window4k`` to ``window`` and ``4k``; a kind may end in a digit itself."""
    if name in kinds:
        return name, ""
    match = re.fullmatch(r"(.*?)_?(\d+[kK]?)", name)
    return (match[1], match[2]) if match else (name, "")
