"""Opening prepared folders with distrust: every change is named before a model sees it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from sextant.core.errors import DataError, UsageError
from sextant.data.dataset import Shards
from sextant.data.loader import Loader
from sextant.data.prepare import opened
from sextant.data.spec import Data


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def refusal(folder: Path, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        Shards(folder, split)
    assert caught.value.exit_code == 3 and "\n" not in caught.value.line()
    return caught.value.line()


@pytest.mark.parametrize("name", ["train-00000.bin", "heldout-00000.bin", "train-00000.idx.bin", "tokenizer.json"])
def test_one_changed_byte_is_noticed(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 4
    (folder / name).write_bytes(content)
    assert (line := refusal(folder)).startswith(f"file changed since it was prepared: {folder}/{name}")
    assert "Run `sextant data prepare` again" in line


def test_files_that_cannot_be_read_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("hashlib.file_digest", fail)
    assert f"cannot read: {folder}/" in (line := refusal(folder)) and "Input/output error" in line


def test_sizes_are_always_checked(folder: Path) -> None:
    path = folder / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match="file changed since it was prepared"):
        Shards(folder, verify=False)
    path.unlink()
    assert "file is missing" in refusal(folder)


def test_ids_outside_the_vocabulary_are_named_when_read(folder: Path) -> None:
    tokens = np.memmap(folder / "train-00000.bin", "<u2", mode="r+")
    tokens[88] = 50_304
    tokens.flush()
    shards = Shards(folder, verify=False)  # what happens above 1 GiB
    loader = Loader(shards, Data(seq_len=16, source=str(folder)))
    with pytest.raises(DataError, match=r"train-00000\.bin position 88 has id 50,304, vocab is \d+") as caught:
        loader.take(loader.rows_per_epoch)
    assert caught.value.exit_code == 3


def test_damaged_or_foreign_index(folder: Path, tmp_path: Path) -> None:
    assert "no prepared data" in refusal(tmp_path / "nowhere")
    path = folder / "index.json"
    good = json.loads(path.read_text())
    outside = {"../x": good["files"]["tokenizer.json"]}
    wrong = {"train-00000.bin": {"bytes": -1, "sha256": ""}}
    for change, message in (
        ({"schema_version": 2}, "damaged index"),
        ({"dtype": "int8"}, "damaged index"),
        ({"files": wrong}, "damaged index"),
        ({"files": good["files"] | outside}, "file is missing"),
        ({"splits": {"train": good["splits"]["train"] | {"tokens": 5}}}, "counts do not fit"),
    ):
        path.write_text(json.dumps(good | change))
        assert message in refusal(folder), change
    assert "no documents in split 'heldout'" in refusal(folder, "heldout")
    for content in (json.dumps(good)[:-30], "[" * 100_000):
        path.write_text(content)
        assert "cannot read" in refusal(folder)


def test_a_damaged_digest_is_shown_short(folder: Path) -> None:
    path = folder / "index.json"
    path.write_text(path.read_text().replace('"sha256": "', '"sha256": "Z'))
    line = refusal(folder).replace(str(path), "index.json")
    assert line.startswith("damaged index (") and "): index.json files." in line
    assert re.search(r'\(got "Z[0-9a-f]{11}\b', line) and len(line) <= 180


def test_a_swapped_tokenizer_is_noticed(folder: Path) -> None:
    state = json.loads((folder / "tokenizer.json").read_text())
    merges = state["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]
    (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False, separators=(",", ":")))
    with pytest.raises(DataError, match="not the tokenizer that made the ids"):
        _ = Shards(folder, verify=False).tokenizer
    (folder / "tokenizer.json").write_bytes(b"\xff" + (folder / "tokenizer.json").read_bytes()[1:])
    with pytest.raises(DataError, match=r"not a tokenizer.json.*byte 0 is not UTF-8"):
        _ = Shards(folder, verify=False).tokenizer


def test_opened_gives_both_splits(prepared: Path) -> None:
    train, held, tokenizer = opened(Data(source=str(prepared), seq_len=8))
    assert (train.split, held.split) == ("train", "heldout")
    assert tokenizer.digest == train.digest == held.digest
    assert train.fingerprint != held.fingerprint
    assert train.tokens == int(train.lengths_N.sum())


def test_declaration() -> None:
    data = Data(seq_len=32)
    assert Data.parse(data.to_dict()) == data
    for change, message in (
        ({"seq_len": 0}, "seq_len"),
        ({"vocab": 100}, "259"),
        ({"source": " "}, "'books'"),
        ({"packing": "pad"}, "'concat' or 'best_fit'"),
        ({"epochs": 0}, "epochs"),
        ({"seqlen": 3}, "Did you mean 'seq_len'"),
    ):
        with pytest.raises(UsageError, match=message):
            Data.parse({"seq_len": 32} | change)
