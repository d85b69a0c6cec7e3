"""Experiments as a grid of arms and seeds: every cell is a small JSON file, run once."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sextant.core import fs

Cell = dict[str, Any]


def arguments(description: str | None, steps: int) -> argparse.Namespace:
    """What every experiment asks for: ``out``, ``seeds``, ``arms`` (all when empty) and ``steps``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", help="only these: several processes may share a grid")
    parser.add_argument("--steps", type=int, default=steps)
    return parser.parse_args()


def fill(
    out: Path, arms: Sequence[str], seeds: Sequence[int], run: Callable[[str, int], Cell], say: Callable[[str], None]
) -> dict[tuple[str, int], Cell]:
    """Run the cells that are missing; returns all of them."""
    out.mkdir(parents=True, exist_ok=True)
    cells = {}
    for seed in seeds:
        for arm in arms:
            path = out / f"{arm.replace(' ', '-')}-seed{seed}.json"
            if not path.exists():
                fs.write_text(path, json.dumps(run(arm, seed)))
                say(f"{arm}, seed {seed}: done")
            cells[arm, seed] = json.loads(path.read_text())
    return cells
