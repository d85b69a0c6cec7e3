"""Prepared folders: what is held out, what is counted, what is refused, and that a failure leaves nothing behind."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_texts import words, write_jsonl

from sextant.core import fs
from sextant.core.errors import DataError, EnvironmentFault, UsageError
from sextant.data import prepare as preparation
from sextant.data.corpus import Corpus, Reading
from sextant.data.dataset import Index, Shards
from sextant.data.prepare import bundled, choose, opened, prepare
from sextant.data.spec import Data
from sextant.data.tokenizer import Tokenizer


def corpus(path: Path, count: int = 30, seed: int = 0) -> Path:
    rng = random.Random(seed)
    rows = [{"text": f"{i} {words(rng, rng.randrange(1, 90))}", "title": f"t{i}"} for i in range(count)]
    return write_jsonl(path, rows)


def decoded(folder: Path, split: str) -> list[str]:
    shards = Shards(folder, split)
    documents = [shards.document(i).tolist() for i in range(len(shards))]
    assert all(ids[-1] == shards.tokenizer.eot_id for ids in documents)
    return [shards.tokenizer.decode(ids[:-1]) for ids in documents]


def test_splits_hold_every_document_once(tmp_path: Path) -> None:
    path = corpus(tmp_path / "a.jsonl")
    index = prepare([path], tmp_path / "out", vocab=300, heldout=0.2, quiet=True)
    train, held = decoded(tmp_path / "out", "train"), decoded(tmp_path / "out", "heldout")
    texts = [document.text for document in Corpus([path])]
    assert [text for text in texts if text in set(train)] == train
    assert sorted(train + held) == sorted(texts)
    assert index.splits["train"].bytes == sum(len(text.encode()) for text in train)
    assert index == Index.read(tmp_path / "out")
    assert {f"t{text.split()[0]}" for text in held} == set(index.heldout_titles)
    assert index.sources[0].path == str(path) and index.sources[0].bytes == path.stat().st_size
    total = sum(split.tokens for split in index.splits.values())
    assert index.tokens_per_byte == total / sum(split.bytes for split in index.splits.values())


def test_the_same_input_gives_the_same_files(tmp_path: Path) -> None:
    path = corpus(tmp_path / "a.jsonl")
    runs = (("1", 5), ("2", 5), ("3", 6))
    first, again, other = (prepare([path], tmp_path / name, vocab=300, seed=seed, quiet=True) for name, seed in runs)
    assert first == again
    assert (tmp_path / "1" / "tokenizer.json").read_bytes() == (tmp_path / "2" / "tokenizer.json").read_bytes()
    assert first.heldout_titles != other.heldout_titles


def test_heldout_text_does_not_train_the_tokenizer(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{word} " * 40} for word in ("abab", "cdcdcd", "efefefef")])
    index = prepare([path], tmp_path / "out", vocab=300, heldout=0.1, quiet=True)
    (held,) = decoded(tmp_path / "out", "heldout")
    tokenizer = Shards(tmp_path / "out").tokenizer
    assert index.splits["heldout"].documents == 1
    assert not any(held.split()[0][:2] in tokenizer.token(i) for i in range(3, tokenizer.vocab_size))


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=50), st.floats(0.001, 0.5), st.integers(0, 1000))
def test_some_but_not_all_is_held_out(sizes: list[int], share: float, seed: int) -> None:
    rank = np.random.default_rng(seed).permutation(len(sizes))
    chosen = choose(np.array(sizes), rank, share)
    assert 0 < chosen.sum() < len(sizes)
    got = np.array(sizes)[chosen].sum() / sum(sizes)
    # Within half of a document, or as near as the smallest document allows.
    assert abs(got - share) <= max(max(sizes) / 2, min(sizes)) / sum(sizes) + 1e-9


def test_equal_documents_are_counted_and_never_in_both_splits(tmp_path: Path) -> None:
    rows = [{"text": f"document {i % 10} {'x' * (i % 10)}"} for i in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    index = prepare([path], tmp_path / "out", vocab=300, heldout=0.3, quiet=True)
    assert index.duplicates == 30
    train, held = set(decoded(tmp_path / "out", "train")), set(decoded(tmp_path / "out", "heldout"))
    assert not train & held and len(train | held) == 10
    with pytest.raises(DataError, match="all documents are the same"):
        prepare([write_jsonl(tmp_path / "b.jsonl", rows[:1] * 5)], tmp_path / "b", quiet=True)


def test_a_single_document_is_cut_at_a_line(tmp_path: Path) -> None:
    text = "".join(f"line {i} of the log\n" for i in range(200))
    (tmp_path / "a.txt").write_text(text)
    index = prepare([tmp_path / "a.txt"], tmp_path / "out", vocab=300, heldout=0.1, quiet=True)
    (train,), (held,) = decoded(tmp_path / "out", "train"), decoded(tmp_path / "out", "heldout")
    assert train + held == text and train.endswith("\n")
    assert abs(len(held) / len(text) - 0.1) < 0.01
    assert index.heldout_titles == (f"{tmp_path}/a.txt (end)",)
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(DataError, match="one short document is too little"):
        prepare([tmp_path / "b.txt"], tmp_path / "b", quiet=True)


def test_empty_documents_and_bad_rows_are_counted(tmp_path: Path) -> None:
    lines = corpus(tmp_path / "a.jsonl", 1500).read_text().splitlines()
    lines[7], lines[9] = '{"text": ""}', "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    index = prepare([tmp_path / "a.jsonl"], tmp_path / "out", vocab=300, reading=Reading(skip_bad=True), quiet=True)
    assert (index.empty, index.bad_rows) == (1, 1) and f"{tmp_path}/a.jsonl:10" in index.bad[0]
    assert sum(split.documents for split in index.splits.values()) == 1498


def test_control_tokens_in_text_stay_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"a<|endoftext|>{i}<|im_start|>\0\u202e"} for i in range(9)])
    prepare([path], tmp_path / "out", vocab=300, heldout=0.1, quiet=True)
    shards = Shards(tmp_path / "out")
    for i in range(len(shards)):
        assert not set(shards.document(i)[:-1].tolist()) & shards.tokenizer.special_ids
    assert all("<|endoftext|>" in text and "\0\u202e" in text for text in decoded(tmp_path / "out", "train"))


def test_pretokenised_rows_need_their_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["abc"], 259)
    rows = [{"input_ids": [7, 8, 9]}, {"input_ids": [10, tokenizer.eot_id]}, {"text": "plain"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match="the corpus holds token ids"):
        prepare([path], tmp_path / "out", quiet=True)
    prepare([path], tmp_path / "out", tokenizer=tokenizer, heldout=0.01, quiet=True)
    splits = [Shards(tmp_path / "out", split) for split in ("train", "heldout")]
    documents = [shards.document(i).tolist() for shards in splits for i in range(len(shards))]
    eot = tokenizer.eot_id
    assert sorted(documents) == sorted([[7, 8, 9, eot], [10, eot], [*tokenizer.encode("plain"), eot]])
    rows[0]["input_ids"][1] = 259
    write_jsonl(path, rows)
    with pytest.raises(DataError, match=f"token id outside the vocabulary: {path}:1 .got 259, expected 259"):
        prepare([path], tmp_path / "bad", tokenizer=tokenizer, heldout=0.01, quiet=True)


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    state = json.loads(Tokenizer.train(["abc"], 259).to_json())
    state["added_tokens"].append(
        {"id": 70_000, "content": "<far>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
    )
    filler = {f"<fill{i}>": i for i in range(259, 70_000)}
    state["model"]["vocab"] |= {**filler, "<far>": 70_000}
    tokenizer = Tokenizer(json.dumps(state))
    assert tokenizer.vocab_size == 70_001
    rows = [{"input_ids": [69_999, 3]}, {"input_ids": [65_536, 4]}, {"text": "b"}]
    index = prepare([write_jsonl(tmp_path / "a.jsonl", rows)], tmp_path / "out", tokenizer=tokenizer, quiet=True)
    assert index.dtype == "uint32"
    assert 69_999 in Shards(tmp_path / "out").document(0)


def test_many_shards_read_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = corpus(tmp_path / "a.jsonl", 60)
    prepare([path], tmp_path / "one", vocab=300, quiet=True)
    monkeypatch.setattr(preparation, "SHARD_TOKENS", 600)
    index = prepare([path], tmp_path / "many", vocab=300, quiet=True)
    assert index.splits["train"].shards > 3
    one, many = Shards(tmp_path / "one"), Shards(tmp_path / "many")
    assert one.lengths_N.tolist() == many.lengths_N.tolist()
    assert all((one.document(i) == many.document(i)).all() for i in range(len(one)))
    assert all(file.bytes <= 600 * 2 for name, file in index.files.items() if name.endswith("0.bin"))


@pytest.mark.parametrize("heldout", [0.0, 0.6, -1.0])
def test_shares_that_make_no_sense(tmp_path: Path, heldout: float) -> None:
    with pytest.raises(UsageError, match="no such share"):
        prepare([corpus(tmp_path / "a.jsonl")], tmp_path / "out", heldout=heldout, quiet=True)


def test_a_taken_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(UsageError, match="the folder is taken"):
        prepare([corpus(tmp_path / "a.jsonl")], tmp_path / "out", quiet=True)
    assert os.listdir(tmp_path / "out") == ["mine"]
    with pytest.raises(UsageError, match="the folder is taken"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "new" / "..", quiet=True)


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    lines = corpus(tmp_path / "a.jsonl").read_text().splitlines()
    tokenizer = Tokenizer.train(["abc"], 259)
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:-1], json.dumps({"input_ids": [9999]})]))
    with pytest.raises(DataError):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=tokenizer, quiet=True)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_what_a_killed_preparation_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path = corpus(tmp_path / "a.jsonl")
    program = (
        "import os, signal, sys; from sextant.core import fs; from sextant.data.prepare import prepare\n"
        "fs.hooks.append(lambda step, path: step == 'rename' and os.kill(os.getpid(), signal.SIGKILL))\n"
        "prepare([sys.argv[1]], sys.argv[2], vocab=300, quiet=True)"
    )
    killed = subprocess.run([sys.executable, "-c", program, path, tmp_path / "out"], check=False)
    assert killed.returncode == -9 and len(os.listdir(tmp_path)) == 2
    prepare([path], tmp_path / "out", vocab=300, quiet=True)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out"]


def test_disk_faults_are_named_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(operation: str, path: Path) -> None:
        if operation == "rename" and path.name == "out":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(fs, "hooks", [full])
    with pytest.raises(EnvironmentFault, match="disk full"):
        prepare([corpus(tmp_path / "a.jsonl")], tmp_path / "out", vocab=300, quiet=True)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = corpus(tmp_path / "a.jsonl")
    train = Tokenizer.train

    def change(texts: object, vocab: int) -> Tokenizer:
        made = train(texts, vocab)  # type: ignore[arg-type]
        path.write_text(path.read_text().replace("0 ", "zero ", 1))
        return made

    monkeypatch.setattr(Tokenizer, "train", change)
    with pytest.raises(DataError, match="the file changed while it was read"):
        prepare([path], tmp_path / "out", vocab=300, quiet=True)


def test_bundled_books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEXTANT_CACHE", str(tmp_path))
    code = "import sys; from sextant.data.prepare import bundled; print(bundled(int(sys.argv[1])))"
    runs = [subprocess.Popen([sys.executable, "-c", code, "300"], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {run.communicate()[0].strip() for run in runs}
    assert [run.returncode for run in runs] == [0, 0] and folders == {str(bundled(300))}
    folder = bundled(300)
    train, held, tokenizer = opened(Data(vocab=300, seq_len=16))
    assert tokenizer.vocab_size == 300 and len(train) + len(held) == 45
    assert train.counts.bytes + held.counts.bytes == 5_702_645
    assert 0.02 < held.counts.bytes / 5_702_645 < 0.08
    before = (folder / "train-00000.bin").read_bytes()
    (folder / "train-00000.bin").write_bytes(bytes([before[0] ^ 1]) + before[1:])
    assert bundled(300) == folder and (folder / "train-00000.bin").read_bytes() == before  # made anew


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SEXTANT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert preparation.cache_folder() == tmp_path / "sextant"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert preparation.cache_folder() == tmp_path / "home" / ".cache" / "sextant"
