"""Around every verb: what becomes of an error, an interrupt, a closed pipe; and what output looks like."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import traceback
from typing import TYPE_CHECKING, Any

import typer

from sextant.core.errors import EnvironmentFault, SextantError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130
CLOSED_PIPE = 141

# On a CPU, torch reports the want of memory as a plain RuntimeError; the last one asks for more than can be counted.
_NO_MEMORY = re.compile("DefaultCPUAllocator|not enough memory|Storage size calculation overflowed")


def run(command: Any, arguments: list[str], debug: bool) -> int:
    """Run a command line and return the exit code; every failure has become one line on stderr."""
    try:
        with command.make_context("sextant", arguments) as context:
            command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; nothing more may be flushed into the pipe when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except Exception as error:
        return report(error, debug)


def report(error: Exception, debug: bool) -> int:
    """Print the error's one line (its traceback before it under ``debug``) and return its exit code."""
    known = as_sextant(error)
    if debug:
        traceback.print_exception(error)
    if known is None:
        _print(f"error: internal error: {type(error).__name__}: {_first_line(error)}. {_crash_file(error)}")
        return 1
    if known.line():
        _print(known.label + known.line())
    return known.exit_code


def as_sextant(error: Exception) -> SextantError | None:
    """The error in our own terms, when it is one that a user can act on."""
    if isinstance(error, SextantError):
        return error
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        return _misuse(error)
    if _out_of_memory(error):
        asked = re.search(r"allocate ([\d.]+ \w+)", str(error))
        got = f"a request for {asked[1]}" if asked else _first_line(error)[:80]
        return EnvironmentFault("out of memory", got=got, fix="Lower the batch, the length or the model's size")
    if isinstance(error, OSError) and error.strerror:
        return EnvironmentFault(error.strerror.lower(), where=str(error.filename or "")[-100:])
    return None


def _out_of_memory(error: Exception) -> bool:
    # By name: the class is torch's, and torch may never have been imported.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return type(error) is RuntimeError and _NO_MEMORY.search(str(error)) is not None


def _misuse(error: Any) -> UsageError:
    """An error of the command-line parser, in one line."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":  # help was asked for by saying nothing
        typer.echo(error.format_message())
        return UsageError("")
    fix = f"See '{context.command_path} --help'" if context else ""
    close = getattr(error, "possibilities", None)
    if close:
        return UsageError("no such option", got=error.option_name, fix=f"Did you mean '{close[0]}'?")
    text = " ".join(error.format_message().split()).rstrip(".")
    return UsageError(text[:1].lower() + text[1:], fix=fix)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "").rstrip(".")


def _crash_file(error: Exception) -> str:
    """Written into the logs of the run folder that the error came through, if it came through one."""
    logs = getattr(error, "logs", None)
    try:
        with tempfile.NamedTemporaryFile("w", prefix="sextant-crash-", suffix=".txt", dir=logs, delete=False) as file:
            traceback.print_exception(error, file=file)
        return f"Traceback in {file.name}"
    except OSError:
        return "Run it again with --debug to see the traceback"


def _print(line: str) -> None:
    typer.echo(" ".join(line.split()), err=True)


def verb(**options: Any) -> typer.Typer:
    """The app of a verb: plain help, which reads at 80 columns, and no options about shells."""
    return typer.Typer(add_completion=False, rich_markup_mode=None, **options)


def console(stderr: bool = False) -> Console:
    """Where tables go: no colour unless a terminal wants it (``NO_COLOR`` is honoured), 80 columns when piped."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 80, highlight=False, markup=False)
