"""docs/contracts.md against the code: every id is there, cited tests exist, refusals are those of the code."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from cases import DENSE, examples, model_spec
from tally import ROWS

from sextant.axes.attention import TABLE, Mixer
from sextant.axes.kv import GQA, KV, POSITIONS
from sextant.axes.kv import TABLE as KVS
from sextant.axes.kv.position import RoPE
from sextant.model.checks import RULES
from sextant.model.spec import Layer

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "contracts.md").read_text()
SERIES = {
    "T": 24, "LA-": 12, "MLA-": 10, "DSA-": 8, "MOE-": 13, "MTP-": 8, "FP8-": 9,
    "MAI-6.2.": 5, "MAI-7.4.": 5, "MAI-8.4.": 6, "MAI-9.4.": 6, "MAI-10.2.": 6, "MAI-11.": 6, "MAI-12.2.": 8,
    "ROUTE-": 5, "BLOCK-": 3,
}
IDS = [f"{series}{number}" for series, last in SERIES.items() for number in range(1, last + 1)]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def rows(title: str) -> list[list[str]]:
    """Cells of the lines of every table under a heading, without the tables' own headings."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    heads = {i for i, line in enumerate(lines[1:]) if set(line) <= set("|-: ")}
    return [cells(line) for i, line in enumerate(lines) if i not in heads and i - 1 not in heads]


PROPERTIES = {row[0]: row for row in rows("Properties and the tests that hold them")}


@cache
def functions_of(path: str) -> frozenset[str]:
    tree = ast.parse((TESTS / path).read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def cited(cell: str) -> list[tuple[str, str]]:
    """File and test; a name without a file is in the file before it."""
    found, file = [], ""
    for path, test in re.findall(r"`([\w/]*(?:\.py)?)::(\w+)`", cell):
        file = path or file
        found.append((file, test))
    return found


def test_every_id_stands_once():
    assert [row[0] for row in rows("Properties and the tests that hold them")] == IDS


@pytest.mark.parametrize("identifier", IDS)
def test_cited_tests_exist(identifier):
    """And where nothing is cited, the page says what is missing."""
    _, words, tests, missing = PROPERTIES[identifier]
    assert words
    assert cited(tests) or missing
    assert tests.count("`") == 2 * len(cited(tests)), f"not all of it reads as file::test: {tests}"
    for path, test in cited(tests):
        assert (TESTS / path).is_file(), path
        assert test in functions_of(path), f"{path} has no {test}"


def described(kv: KV) -> str:
    """A KV option by what refusals turn on."""
    if not isinstance(kv, GQA):
        return getattr(kv, "kind", "")
    if not isinstance(kv.position, RoPE):
        return f"gqa, {getattr(kv.position, 'kind', '')}"
    return "gqa, rope over a part" if kv.position.fraction < 1 else f"gqa, KV heads: {kv.kv_heads}"


def kvs() -> list[KV]:
    plain = GQA(heads=4, kv_heads=2, head_dim=8)
    return [*examples(KVS), *(plain.replace(position=position) for position in examples(POSITIONS))]


def refusals() -> set[tuple[str, str, str, str, str]]:
    """Row, KV option, field, reason and remedy of pairs of examples that a rule refuses; numbers in reasons read n."""
    found = set()
    for attention in examples(TABLE):
        for kv in kvs() if not isinstance(attention, Mixer) else []:
            model = model_spec(Layer.parse({"attention": attention, "kv": kv, "feed_forward": DENSE}))
            for where, what, remedy in (problem for rule in RULES for problem in rule(model)):
                what = re.sub(r"\b\d+\b", "n", what)
                found.add((attention.kind, described(kv), where.removeprefix("layers[0]."), what, remedy))
    return found


def test_refusals_are_the_ones_of_the_code():
    want = refusals()
    told = {tuple(row) for row in rows("What is refused")}
    missing = "\n".join("| " + " | ".join(line) + " |" for line in sorted(want - told))
    assert not want - told, f"add to docs/contracts.md:\n{missing}"
    assert not told - want, f"nothing refuses: {sorted(told - want)}"


def test_every_row_is_counted():
    assert {name for kinds in ROWS.values() for name in kinds} <= {
        line[0] for line in rows("Counts of the contract suite")
    }
