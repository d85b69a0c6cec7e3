"""Documents: their links lead somewhere, and the commands that the README shows exist."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from sextant.cli import VERBS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)")
COMMAND = re.compile(r"^(?:\$ )?sextant (.+?)(?:\s+#.*)?$", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    broken = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert not broken


def test_the_readme_shows_commands_that_exist():
    shown = COMMAND.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(shown) >= 8
    for line in shown:
        verb, *words = shlex.split(line)
        assert verb in VERBS, line
        command: Any = get_command(import_module(f"sextant.cli.{verb}").app)
        if hasattr(command, "commands") and words and not words[0].startswith("-"):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known | {"--help"}, line
