"""Shape suffixes in the code use the letters of ``docs/legend.md``, each of which has one meaning."""

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| ([A-Z]) \| (.+) \|$", re.MULTILINE)
SUFFIX = re.compile(r"[a-z][a-z0-9_]*_([A-Z0-9]*[A-Z][A-Z0-9]*)")


def letters() -> list[str]:
    return [letter for letter, _ in ROW.findall((ROOT / "docs/legend.md").read_text(encoding="utf-8"))]


def names(tree: ast.AST) -> set[str]:
    """Every variable, argument, attribute and keyword."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            found.add(node.arg)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
    return found


def suffixes() -> dict[str, set[str]]:
    """Shape suffix -> the names that carry it."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "sextant").rglob("*.py"):
        for name in names(ast.parse(path.read_text(encoding="utf-8"))):
            if match := SUFFIX.fullmatch(name):
                found.setdefault(match[1], set()).add(f"{name} in {path.relative_to(ROOT)}")
    return found


def test_legend_gives_each_letter_once():
    assert [letter for letter, times in Counter(letters()).items() if times > 1] == []
    assert set("TSBDHGKVRWMJNFEACPL") <= set(letters())


def test_suffixes_use_the_letters_of_the_legend():
    known = set(letters())
    unknown = {suffix: used for suffix, used in suffixes().items() if not set(re.sub(r"\d", "", suffix)) <= known}
    assert unknown == {}


def test_the_search_finds_suffixes():
    """The test above is no accident of an empty search."""
    found = suffixes()
    assert {"TD", "THK", "HTS", "TA", "EDF", "BT"} <= set(found)


def test_a_suffix_names_each_axis_once():
    """Two axes of one letter could not be told apart."""
    twice = {suffix: used for suffix, used in suffixes().items() if len(set(suffix)) < len(suffix)}
    assert twice == {}
