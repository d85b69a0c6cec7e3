"""Errors a user can act on: one line each, with the exit code that belongs to it.

The line reads ``error: WHAT: WHERE (got GOT, expected EXPECTED). FIX`` and stays within 200 characters where the
parts allow it. Exit codes follow the table in ``docs/errors.md``: 2 usage, 3 data, 4 checkpoint or model, 5 numerics,
6 environment, 7 lost peer, 75 stopped after saving (safe to run again).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import accumulate
from typing import Self

ROOM = 90
"""Characters for a list of names in an error's line."""


class SextantError(Exception):
    """Base of every error with a cure. ``exit_code`` is what the command line returns, ``label`` begins its line."""

    exit_code = 1
    label = "error: "

    def __init__(self, what: str, *, where: object = "", got: object = "", expected: object = "", fix: str = ""):
        self.what, self.where, self.got, self.expected, self.fix = what, str(where), str(got), str(expected), fix
        super().__init__(self.line())

    def line(self) -> str:
        """The one line a person reads, without the leading ``error:``."""
        text = self.what
        if self.where:
            text += f": {self.where}"
        facts = [f"got {self.got}"] * bool(self.got) + [f"expected {self.expected}"] * bool(self.expected)
        if facts:
            text += f" ({', '.join(facts)})"
        return f"{text}. {self.fix}" if self.fix else text

    def within(self, place: str) -> Self:
        """The same error, its place inside another: ``run.yaml`` before ``model.width``."""
        where = f"{place} {self.where}".strip()
        return type(self)(self.what, where=where, got=self.got, expected=self.expected, fix=self.fix)


class UsageError(SextantError):
    """Bad command line, declaration or combination of options; nothing was started."""

    exit_code = 2


class DataError(SextantError):
    """A data file or tokenizer cannot be used as given."""

    exit_code = 3


class CheckpointError(SextantError):
    """A checkpoint or model folder is unreadable, damaged, or belongs to something else."""

    exit_code = 4


class NumericsError(SextantError):
    """Training met a non-finite value or used up its spike policy; the last good checkpoint is kept."""

    exit_code = 5


class EnvironmentFault(SextantError):
    """The machine said no: disk full, folder in use or read-only, out of memory, no such device."""

    exit_code = 6


class Stopped(SextantError):
    """Training was asked to stop and has saved; the same command goes on from there."""

    exit_code = 75
    label = ""


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that this one looks like."""
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` for the closest known name, else the known names themselves, as many as fit in a line."""
    known = sorted(known)
    close = closest(name, known)
    if close:
        return f"Did you mean '{close}'?"
    fits = sum(end <= ROOM for end in accumulate(len(item) + 2 for item in known)) or 1
    return f"Known: {', '.join(known[:fits])}{', ...' if len(known) > fits else ''}"
