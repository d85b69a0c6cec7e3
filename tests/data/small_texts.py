"""Random words and files of rows, for the tests of this folder."""

import json
import random
from pathlib import Path

WORDS = ["sail", "harbour", "compass", "naïve", "wind", "star", "日本語", "tide", "the", "of", "and", "🧭", "mast"]


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count)) + rng.choice([".\n", "!", ""])


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
