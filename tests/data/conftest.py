"""Folders prepared from small corpora of random words."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from small_texts import words, write_jsonl

from sextant.data.prepare import prepare
from sextant.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 documents of 1 to 200 words."""
    rng, root = random.Random(7), tmp_path_factory.mktemp("prepared")
    rows = [{"text": words(rng, rng.choice([1, 2, 9, 40, 200])), "title": f"text {i}"} for i in range(40)]
    prepare([write_jsonl(root / "a.jsonl", rows)], root / "out", vocab=320, heldout=0.2, seed=3, quiet=True)
    return root / "out"


@pytest.fixture
def of_lengths(tmp_path: Path) -> Callable[[list[int]], Path]:
    """Prepare documents of exactly these lengths in tokens, end-of-text included; each distinct."""

    def make(lengths: list[int]) -> Path:
        rng = random.Random(len(lengths))
        rows = [{"input_ids": [rng.randrange(10, 250) for _ in range(n - 1)] + [0]} for n in lengths]
        # A tail that is longer than the rest is never what is held out, so the training split is `lengths`.
        corpus = write_jsonl(tmp_path / "ids.jsonl", [*rows, {"input_ids": [5, 0]}])
        prepare([corpus], tmp_path / "ids", tokenizer=Tokenizer.train(["abc"], 259), heldout=1e-6, quiet=True)
        return tmp_path / "ids"

    return make
