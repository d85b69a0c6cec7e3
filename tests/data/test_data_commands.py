"""``sextant data`` and ``sextant tokenizer`` as a person runs them."""

import json
from pathlib import Path

import pytest
from small_texts import write_jsonl
from typer.testing import CliRunner

from sextant.cli.data import app as data
from sextant.cli.tokenizer import app as tokenizer
from sextant.core.errors import UsageError
from sextant.data.dataset import Shards
from sextant.data.inspect import BORDER, runs
from sextant.data.loader import Loader
from sextant.data.spec import Data


def run(app: object, *args: object) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)  # type: ignore[arg-type]
    assert result.exit_code == 0, result.output
    return result.stdout


def corpus(path: Path) -> Path:
    return write_jsonl(path, [{"body": f"number {i}, and the wind\n"} for i in range(30)])


def test_prepare_prints_a_table_or_json(tmp_path: Path) -> None:
    path = corpus(tmp_path / "a.jsonl")
    shown = run(data, "prepare", path, "--out", tmp_path / "out", "--vocab", "300", "--text-field", "body", "--quiet")
    assert "train" in shown and "heldout" in shown and "tokens per byte" in shown and "0 bad rows" in shown
    run(tokenizer, "train", path, "--vocab", "0.3k", "--out", tmp_path / "t.json", "--text-field", "body", "--quiet")
    options = ["--tokenizer", tmp_path / "t.json", "--text-field", "body", "--json", "--quiet", "--heldout", 0.3]
    found = json.loads(run(data, "prepare", path, "--out", tmp_path / "2", *options))
    assert found["folder"] == str(tmp_path / "2") and found["heldout"] == 0.3
    assert found["tokenizer"] == Shards(tmp_path / "2").tokenizer.digest
    with pytest.raises(UsageError, match="exclude each other"):
        run(data, "prepare", path, "--out", tmp_path / "3", "--vocab", "300", "--tokenizer", tmp_path / "t.json")


def test_prepare_refuses_seeds_that_its_index_could_not_hold(tmp_path: Path) -> None:
    arguments = ["prepare", str(corpus(tmp_path / "a.jsonl")), "--out", str(tmp_path / "out"), "--seed", str(2**63)]
    assert CliRunner().invoke(data, arguments).exit_code == 2


def test_inspect_shows_borders_and_what_carries_no_loss(prepared: Path) -> None:
    shown = run(data, "inspect", prepared, "--n", 8, "--seq-len", 32, "--packing", "best_fit")
    assert shown.count("sample ") == 8 and BORDER in shown and "\x1b" not in shown
    assert all(f"sample {i}: " in shown for i in range(8))
    assert shown.count("⟦") == shown.count("⟧") >= 9
    with pytest.raises(UsageError, match="no such split"):
        run(data, "inspect", prepared, "--split", "test")
    assert "sample 0" in run(data, "inspect", prepared, "--split", "heldout", "--seq-len", "16", "--n", 1)


def test_runs_are_the_row_and_first_tokens_carry_no_loss(prepared: Path) -> None:
    loader = Loader(Shards(prepared), Data(source=str(prepared), seq_len=48))
    tokenizer = loader.shards.tokenizer
    for sample in range(12):
        row = loader.row(sample)
        found = list(runs(row, tokenizer))
        assert "".join(text for text, _, _ in found) == tokenizer.decode(row.tokens_T[: row.used].tolist())
        assert not found[0][1]
        assert all(not loss for _, loss, border in found if border)
        assert sum(border for _, _, border in found) == row.starts_T[1 : row.used].sum()


def test_terminal_codes_in_text_are_shown_not_obeyed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"a\x1b[31mred\u202e {i}"} for i in range(20)])
    run(data, "prepare", path, "--out", tmp_path / "out", "--vocab", "300", "--quiet")
    shown = run(data, "inspect", tmp_path / "out", "--seq-len", 64)
    assert "\\x1b[31mred\\x202e" in shown and "\x1b" not in shown and "\u202e" not in shown


def test_show_a_tokenizer(prepared: Path) -> None:
    facts = json.loads(run(tokenizer, "show", prepared, "the wind<|endoftext|>", "--json"))
    own = Shards(prepared).tokenizer
    assert facts["ids"] == own.encode("the wind<|endoftext|>") and own.eot_id not in facts["ids"]
    assert (facts["vocab"], facts["digest"], facts["bytes"]) == (own.vocab_size, own.digest, 21)
    assert own.digest in run(tokenizer, "show", prepared / "tokenizer.json")
