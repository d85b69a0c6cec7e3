"""Plain data (dicts, lists, numbers, text, booleans, None) and its YAML: read as people expect, written so that it
comes back, and refused in one line where it is not what it should be.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from sextant.core.errors import UsageError
from sextant.core.units import parse_size

DEEPEST = 100
"""Levels of a document; a declaration has about ten."""
_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_EXPONENT = re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$")
"""YAML 1.1 reads ``1e-4`` as text; reader and writer both take it for the number it looks like."""


class _Loader(yaml.SafeLoader):
    """Keys are text and written once, dates are text, and nothing is endless."""

    def __init__(self, text: str):
        super().__init__(text)
        self.above: list[yaml.Node | None] = []

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        self.above.append(parent)
        if len(self.above) > DEEPEST:
            raise ComposerError(None, None, f"nested more than {DEEPEST} deep", event.start_mark)
        if isinstance(event, yaml.AliasEvent) and self.anchors.get(event.anchor, event) in self.above:
            raise ComposerError(None, None, f"*{event.anchor} contains itself", event.start_mark)
        node = super().compose_node(parent, index)
        self.above.pop()
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag not in (_TEXT, _MERGE):
                raise ConstructorError(None, None, "a key must be text", key.start_mark)
            if key.value in seen and key.tag == _TEXT:
                raise ConstructorError(None, None, f"key '{key.value}' is written twice", key.start_mark)
            seen.add(key.value)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge ``<<`` in: own keys win, then the first mapping; PyYAML itself takes names for one by their address."""
        merged: dict[str, Any] = {}
        for _, sources in [pair for pair in node.value if pair[0].tag == _MERGE]:
            for source in sources.value if isinstance(sources, yaml.SequenceNode) else [sources]:
                if not isinstance(source, yaml.MappingNode):
                    raise ConstructorError(None, None, "<< needs a mapping", source.start_mark)
                self.flatten_mapping(source)
                merged = {key.value: (key, value) for key, value in source.value} | merged
        own = {key.value: (key, value) for key, value in node.value if key.tag != _MERGE}
        node.value = list((merged | own).values())

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError) as error:  # such as !!int "" or a number of 5,000 digits
            raise ConstructorError(None, None, f"not a value: {error}", node.start_mark) from None


class _Dumper(yaml.SafeDumper):
    """Writes what :class:`_Loader` reads back."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in rules if tag != "tag:yaml.org,2002:timestamp"]
    for first, rules in _Loader.yaml_implicit_resolvers.items()
}


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
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise UsageError("not valid YAML", where=line, got=problem) from None


def parse_value(text: str) -> Any:
    """The value that a person types: YAML, with sizes such as ``32k`` understood as whole numbers; else the text."""
    try:
        value = yaml.load(text, Loader=_Loader)
        is_size = isinstance(value, str) and re.fullmatch(r"\d[\d_.]*(k|m|b|t|K|Ki|Mi|Gi)", value)
        return parse_size(value) if is_size else value
    except (yaml.YAMLError, UsageError):
        return text


def write_yaml(data: Any) -> str:
    """YAML text that :func:`read_yaml` gives back; equal dicts are written once and referred to."""
    return yaml.dump(_share_equal(data, {}), Dumper=_Dumper, sort_keys=False, width=120)


def write_value(value: Any) -> str:
    """A leaf as YAML on one line, which :func:`parse_value` gives back."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=math.inf).removesuffix("\n")
    if "\n" in text.removesuffix("\n..."):
        text = yaml.dump(value, Dumper=_Dumper, default_style='"', width=math.inf).removesuffix("\n")
    return text.removesuffix("\n...")


def leaves(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """``("layers[0].attention.window", 8)``: every scalar and every list of scalars by its path."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from leaves(value, f"{path}.{key}" if path else key)
    elif isinstance(data, list) and any(isinstance(item, dict | list) for item in data):
        for index, value in enumerate(data):
            yield from leaves(value, f"{path}[{index}]")
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
