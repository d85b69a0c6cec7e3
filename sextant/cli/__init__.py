"""The command line: one verb, one file. A verb's module is imported when that verb is called, never for ``--help``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from sextant import __version__
from sextant.cli import frame
from sextant.core.errors import UsageError, nearest

VERBS = {
    "doctor": "What this machine can do: versions, devices, memory, extras.",
    "list": "Recipes, and the options of every axis.",
    "show": "A recipe or run file: layers, parameters, FLOPs, decoding state.",
    "data": "Prepare text for training, and look at it.",
    "tokenizer": "Train a tokenizer, and look at one.",
    "audit": "Which tensor is in which dtype and why, read off one real step.",
    "train": "Train a recipe or run file; the same command resumes.",
    "lab": "Compare recipes with paired seeds.",
    "report": "Look inside: what sparse layers read, expert load, where gradient arrives.",
    "generate": "Continue a prompt with a trained model.",
    "chat": "Talk to a trained model in the terminal.",
    "demo": "Train the twin of MAI-Base-1 on bundled books, and let it write.",
}
"""Verb -> the line that ``sextant --help`` shows."""


class Verbs(TyperGroup):
    """A group whose members are the modules ``sextant.cli.VERB``, each with a typer app named ``app``."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*VERBS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The verb's command, imported now.

        Raises:
            UsageError: no such verb; the nearest one is offered.
        """
        if cmd_name not in VERBS:
            raise UsageError("no such verb", got=f"'{cmd_name}'", fix=nearest(cmd_name, VERBS))
        command = get_command(import_module(f"sextant.cli.{cmd_name}").app)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([*VERBS.items()])  # ``list`` is a module here once that verb was used


app = typer.Typer(cls=Verbs, add_completion=False, rich_markup_mode=None)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"sextant {__version__}")
        raise typer.Exit


@app.callback(
    no_args_is_help=True,
    epilog="Any verb takes --help, and --debug (or SEXTANT_DEBUG=1) to see the traceback of an error.",
)
def _sextant(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Design, budget, train and use long-context sparse language models."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point ``sextant``: run one verb and exit with its code (``docs/errors.md``)."""
    given = [*(sys.argv[1:] if arguments is None else arguments)]
    rest = given.index("--") if "--" in given else len(given)
    debug = "--debug" in given[:rest] or os.environ.get("SEXTANT_DEBUG", "") not in ("", "0")
    given = [word for i, word in enumerate(given) if word != "--debug" or i > rest]
    sys.exit(frame.run(get_command(app), given, debug))
