"""The table of an axis: one row per option, read by the tests, ``sextant list``, the budget, the docs and the plots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sextant.core.spec import Spec


@dataclass(frozen=True)
class Row:
    """One option of an axis.

    Attributes:
        spec: the declaration; its ``kind`` is the option's name.
        line: what it does, in a few words.
        source: paper or system it comes from.
        examples: small instances that the contract tests run; together they cover the option's fields.
    """

    spec: type[Spec]
    line: str
    source: str
    examples: tuple[Spec, ...]

    @property
    def name(self) -> str:
        return str(self.spec.model_fields["kind"].default)


@dataclass(frozen=True)
class Table:
    """All options of one axis (or of one question inside an axis)."""

    axis: str
    question: str
    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)
