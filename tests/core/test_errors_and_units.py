"""Errors as lines, and numbers as people write and read them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sextant.core import errors
from sextant.core.errors import SextantError, UsageError, nearest
from sextant.core.units import count, duration, parse_size, size


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        ({}, "what"),
        ({"where": "file.yaml:3"}, "what: file.yaml:3"),
        ({"got": 4, "expected": "5"}, "what (got 4, expected 5)"),
        ({"where": "a.b", "got": "x", "fix": "Do y"}, "what: a.b (got x). Do y"),
        ({"got": 0, "expected": 1}, "what (got 0, expected 1)"),
    ],
)
def test_line(parts, line):
    error = SextantError("what", **parts)
    assert str(error) == error.line() == line


def test_exit_codes_differ_by_kind_of_trouble():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SextantError)]
    codes = {kind.__name__: kind.exit_code for kind in kinds}
    assert codes["UsageError"] == 2
    assert codes["DataError"] == 3
    assert codes["CheckpointError"] == 4
    assert codes["NumericsError"] == 5
    assert codes["EnvironmentFault"] == 6
    assert codes["Stopped"] == 75
    assert len(set(codes.values())) == len(codes)


def test_nearest():
    assert nearest("windw", ["window", "sinks"]) == "Did you mean 'window'?"
    assert nearest("zzz", ["b", "a"]) == "Known: a, b"
    assert nearest("zzz", map(str, range(200))).endswith(", ...") and len(nearest("zzz", ["name"] * 99)) < 120


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0), ("4096", 4096), ("32k", 32_000), ("32K", 32_768), ("32Ki", 32_768), ("1.5k", 1500), ("2m", 2 * 10**6),
        ("3b", 3 * 10**9), ("1t", 10**12), ("8Mi", 8 * 2**20), ("0.5Gi", 2**29), ("1e9", 10**9), ("10_000", 10_000),
        (" 7 ", 7),
    ],
)  # fmt: skip
def test_sizes(text, value):
    assert parse_size(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "k", "1.5", "-3", "1kk", "0x10", "ten", "1.0001k", "3 k", "1e-3", "inf", "nan", "1e999", "9" * 400 + "k"],
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


@given(st.integers(0, 2**53))
def test_whole_numbers_are_sizes(n):
    assert parse_size(str(n)) == n


@pytest.mark.parametrize(
    ("n", "text"),
    [(962_150_000_000, "962.15 B"), (34_700_000_000, "34.70 B"), (1_234, "1.23 k"), (12, "12"), (3.4e13, "34.00 T")],
)
def test_counts(n, text):
    assert count(n) == text


@pytest.mark.parametrize(
    ("n", "text"),
    [(512, "512 B"), (2048, "2.0 KiB"), (2_040_109_466, "1.9 GiB"), (3 * 2**40, "3.0 TiB"), (2**20, "1.0 MiB")],
)
def test_memory_sizes(n, text):
    assert size(n) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (41, "41s"), (59.6, "1m00s"), (222, "3m42s"), (7500, "2h05m"), (3599.7, "1h00m")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("seconds", [-1, math.nan, math.inf, 1e12])
def test_a_time_that_makes_no_sense_is_a_dash(seconds):
    assert duration(seconds) == "-"
