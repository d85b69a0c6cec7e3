"""After a run with contract tests: how many checks passed, row by row of axis 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

HEADINGS = {
    "past": ("token_changes_nothing", "t3_", "t11_choices"),
    "fed": ("prefill", "ragged_batch", "one_token", "late_positions", "equal_rows", "t4_", "t5_"),
    "packed": ("packed_sequences", "no_bit", "batch_order", "t6_"),
    "undone": ("rolled_back", "one_sequence_of_a_batch", "forks", "t11_a"),
    "grads": ("gradients", "t10_"),
    "hard": ("t14_", "t24_"),
    "cost": ("state_bytes", "pattern_counts"),
}
"""Checks by how their names begin: no later token counts; the same however it is fed; apart from neighbours; taken
back and forked; gradients; symmetry, ties and huge numbers; bytes and parameters as declared.
"""


def heading(test: str) -> str | None:
    """The column of a test function, None for tests that belong to no row."""
    words = test.removeprefix("test_")
    return next((head for head, marks in HEADINGS.items() if words.startswith(marks)), None)


def kind(parameters: str, kinds: Iterable[str]) -> str | None:
    """The row that a test's parameters begin with."""
    return next((one for one in kinds if f"{parameters}-".startswith((f"{one}-", f"{one}("))), None)


def tally(nodeids: Iterable[str], kinds: Iterable[str]) -> Counter[tuple[str, str]]:
    """Contract tests by row and column."""
    counts: Counter[tuple[str, str]] = Counter()
    for nodeid in nodeids:
        path, _, rest = nodeid.partition("::")
        test, _, parameters = rest.removesuffix("]").partition("[")
        row, head = kind(parameters, kinds), heading(test)
        if "contracts/" in path and row and head:
            counts[row, head] += 1
    return counts


def table(passed: Counter[tuple[str, str]], failed: Counter[tuple[str, str]], kinds: Iterable[str]) -> Iterator[str]:
    """Lines: passed, and ``!n`` where n failed; a dot where nothing ran."""
    rows = [row for row in kinds if any(one == row for one, _ in passed + failed)]
    wide = max(map(len, rows))
    yield " " * wide + "".join(f"{head:>9}" for head in HEADINGS)
    for row in rows:
        cells = [(passed[row, head], failed[row, head]) for head in HEADINGS]
        yield f"{row:<{wide}}" + "".join(f"{(f'{good} !{bad}' if bad else good or '.'):>9}" for good, bad in cells)
    sums = [sum(count for (_, one), count in passed.items() if one == head) for head in HEADINGS]
    yield f"{'sum':<{wide}}" + "".join(f"{count:>9}" for count in sums)
