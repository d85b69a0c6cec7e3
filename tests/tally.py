"""After a run with contract tests: how many checks passed, row by row of the tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from sextant.axes.attention import TABLE as ATTENTION
from sextant.axes.capacity import TABLE as CAPACITY
from sextant.axes.numerics import TABLE as NUMERICS
from sextant.axes.routing import BALANCE, OVERFLOW
from sextant.axes.routing import TABLE as ROUTING
from sextant.axes.stability import INITS, NORMS
from sextant.axes.stability import TABLE as STABILITY

ROWS = {
    "axis 1": [row.name for row in ATTENTION],
    "axes 3 to 6": [
        row.name
        for table in (CAPACITY, ROUTING, OVERFLOW, BALANCE, STABILITY, NORMS, INITS, NUMERICS) for row in table
    ],
}
"""Kinds by the part of the counts that they stand in."""

HEADINGS = {
    "past": ("token_changes_nothing", "t3_", "t11_choices", "past_"),
    "fed": ("prefill", "ragged_batch", "one_token", "late_positions", "equal_rows", "t4_", "t5_"),
    "packed": ("packed_sequences", "no_bit", "batch_order", "t6_"),
    "undone": ("rolled_back", "one_sequence_of_a_batch", "forks", "t11_a"),
    "replay": ("own_record", "a_record_of_steps", "chunks_record", "other_blocks"),
    "counts": ("counts_",),
    "grads": ("gradients", "grads_", "t10_"),
    "hard": ("t14_", "t24_", "hard_"),
    "cost": (
        "state_bytes", "pattern_counts", "cost_", "part_counts", "router_counts", "norms_count", "active_parameters",
        "exchange_counts",
    ),
}
"""Checks by how their names begin: no later token counts; the same however it is fed; apart from neighbours; taken
back and forked; recorded choices followed; no copy lost uncounted; gradients; symmetry, ties, huge numbers and few
tokens; bytes, parameters and FLOPs as declared.
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
