"""Every row of every table: a name, a line, a source, examples that round-trip and together use every field."""

import json

import pytest
import yaml
from cases import params

from sextant.axes.attention import TABLE as ATTENTION
from sextant.axes.capacity import TABLE as CAPACITY
from sextant.axes.kv import POSITIONS
from sextant.axes.kv import TABLE as KV
from sextant.axes.numerics import TABLE as NUMERICS
from sextant.axes.routing import BALANCE, OVERFLOW
from sextant.axes.routing import TABLE as ROUTING
from sextant.axes.stability import INITS, NORMS
from sextant.axes.stability import TABLE as STABILITY
from sextant.core.errors import UsageError

TABLES = (ATTENTION, KV, POSITIONS, CAPACITY, ROUTING, OVERFLOW, BALANCE, STABILITY, NORMS, INITS, NUMERICS)
ROWS = [pytest.param(row, id=f"{table.axis}-{row.name}") for table in TABLES for row in table]
EXAMPLES = params(example for table in TABLES for row in table for example in row.examples)
ELSEWHERE = {"position", "router", "overflow", "balance", "norm"}
"""Fields that are options of another table, whose own examples vary them."""


@pytest.mark.parametrize("row", ROWS)
def test_row_says_what_it_is(row):
    assert row.name and row.line and row.source and row.examples
    assert all(type(example) is row.spec for example in row.examples)
    assert row.spec.__doc__


@pytest.mark.parametrize("table", [pytest.param(table, id=table.axis) for table in TABLES])
def test_names_in_a_table_differ(table):
    names = [row.name for row in table]
    assert len(set(names)) == len(names)
    assert table.question.endswith("?")


@pytest.mark.parametrize("row", ROWS)
def test_examples_use_every_choice(row):
    """A switch, a name or an optional part that is the same in all examples is not tested by them; numbers may be."""
    for name in set(row.spec.model_fields) - ELSEWHERE - {"kind"}:
        values = [example.to_dict()[name] for example in row.examples]
        differ = len({json.dumps(value) for value in values}) > 1
        assert differ or type(values[0]) in (int, float), f"{row.name}.{name} is {values[0]} in every example"


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_round_trip(example):
    kind = type(example)
    assert kind.parse(yaml.safe_load(example.to_yaml())) == example
    assert kind.parse(json.loads(json.dumps(example.to_dict()))) == example
    assert hash(kind.parse(example.to_dict())) == hash(example)


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_are_frozen_and_strict(example):
    with pytest.raises(ValueError, match="frozen"):
        example.kind = "other"
    with pytest.raises(UsageError, match="unknown key"):
        type(example).parse({**example.to_dict(), "surprise": 1})
    with pytest.raises(UsageError, match="kind"):
        type(example).parse({**example.to_dict(), "kind": "surprise"})
