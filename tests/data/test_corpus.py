"""Reading documents: every way a file can be wrong has its line, and nothing is used of a file that ends early."""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from small_texts import words, write_jsonl

from sextant.core.errors import DataError, UsageError
from sextant.data.corpus import Corpus, Reading


def texts(*paths: Path, **reading: object) -> list[str]:
    return [document.text for document in Corpus(paths, Reading(**reading))]  # type: ignore[arg-type]


def refusal(*paths: Path, **reading: object) -> str:
    with pytest.raises(DataError) as caught:
        texts(*paths, **reading)
    assert caught.value.exit_code == 3
    assert "\n" not in caught.value.line()
    return caught.value.line()


def rows(count: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [{"text": f"{i} {words(rng, rng.randrange(1, 30))}"} for i in range(count)]


def test_every_kind_gives_the_same_documents(tmp_path: Path) -> None:
    made = rows(300)
    raw = write_jsonl(tmp_path / "a.jsonl", made).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(raw[:700]) + gzip.compress(raw[700:]))
    frames = [zstandard.ZstdCompressor().compress(part) for part in (raw[:900], raw[900:])]
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(frames))
    pq.write_table(pa.table({"text": [row["text"] for row in made]}), tmp_path / "d.parquet", row_group_size=70)
    expected = [row["text"] for row in made]
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        assert texts(tmp_path / name) == expected, name


def test_endings_are_read_in_any_case_and_other_kinds_are_counted(tmp_path: Path) -> None:
    (tmp_path / "A.TXT").write_text("first")
    (tmp_path / "b.Md.GZ").write_bytes(gzip.compress(b"second"))
    (tmp_path / "picture.PNG").write_bytes(b"x")
    (tmp_path / ".hidden.xyz").write_bytes(b"x")
    corpus = Corpus([tmp_path])
    assert [document.text for document in corpus] == ["first", "second"]
    assert (len(corpus.files), corpus.passed_over) == (2, 1)


def test_folders_are_walked_by_name_and_text_files_are_documents(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfb\r\n")
    (tmp_path / "a.md").write_text("# a")
    (tmp_path / "sub" / "c.txt.gz").write_bytes(gzip.compress("ç".encode()))
    (tmp_path / "photo.jpg").write_bytes(b"\0\1")
    (tmp_path / ".hidden.txt").write_text("no")
    assert texts(tmp_path) == ["# a", "b\r\n", "ç"]
    assert texts(tmp_path / "b.txt", tmp_path) == ["b\r\n", "# a", "ç"]  # a file named twice is read once


def test_titles_and_places(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "title": "one"}, {"text": "y", "id": 7}, {"text": "z"}])
    found = list(Corpus([path]))
    assert [document.title for document in found] == ["one", "7", f"{path}:3"]
    assert [document.where for document in found] == [f"{path}:{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize("content", ["", "\n \n\n", '{"text": ""}\n{"text": "  \\n"}\n'])
def test_no_documents(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    assert f"{tmp_path}/a.jsonl has no documents" in refusal(tmp_path / "a.jsonl")


def test_empty_text_files_count_but_a_corpus_of_them_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    assert "a.txt has no documents" in refusal(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("b")
    corpus = Corpus([tmp_path])
    assert [document.text for document in corpus] == ["b"]
    assert (corpus.rows, corpus.empty) == (2, 1)


def test_invalid_json_names_the_line(tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", rows(20)).read_text().splitlines()
    lines[11] = lines[11][:-5]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert f"not valid JSON: {tmp_path}/a.jsonl:12 (got Unterminated string" in refusal(tmp_path / "a.jsonl")


@pytest.mark.parametrize("line", ["[" * 100_000, '{"text": ' + "9" * 5000 + "}", "17", '"text"'])
def test_odd_json_is_refused_in_one_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(line)
    assert f"{tmp_path}/a.jsonl:1 (got" in refusal(tmp_path / "a.jsonl")


def test_missing_or_wrong_field(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"prompt": "p", "answer": "q"}])
    expected = f"{path}:2 has no field 'text' (found: prompt, answer). Set --text-field"
    assert refusal(path) == expected
    path = write_jsonl(tmp_path / "b.jsonl", [{"text": 5}])
    assert f"field 'text' is a number: {path}:1 (expected a string)" in refusal(path)
    path = write_jsonl(tmp_path / "c.jsonl", [{"body": "x"}])
    assert texts(path, text_field="body") == ["x"]


def test_token_ids(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [3, 2**31]}, {"input_ids": []}])
    corpus = Corpus([path])
    (document,) = corpus
    assert document.ids is not None and document.ids.tolist() == [3, 2**31]
    assert corpus.empty == 1
    for bad in ([1, -1], [1.5], [True], "text", [2**32]):
        assert "field 'input_ids'" in refusal(write_jsonl(tmp_path / "b.jsonl", [{"input_ids": bad}]))


def test_not_utf8_names_line_and_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"first\nse\xe9 cond\n")
    assert f"not UTF-8: {tmp_path}/a.txt:2:3 (got byte 0xe9)" in refusal(tmp_path / "a.txt")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    assert f"not UTF-8: {tmp_path}/b.jsonl:2:14" in refusal(tmp_path / "b.jsonl")
    assert texts(tmp_path / "a.txt", tmp_path / "b.jsonl", encoding_errors="replace") == [
        "first\nse\ufffd cond\n", "a", "caf\ufffd"
    ]


def test_lone_surrogates(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ab\\ud800"}\n')
    assert f"lone surrogate: {tmp_path}/a.jsonl:1 (got U+D800 at character 3" in refusal(tmp_path / "a.jsonl")
    assert texts(tmp_path / "a.jsonl", encoding_errors="replace") == ["ab\ufffd"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_wide_text_is_named(tmp_path: Path, encoding: str, name: str) -> None:
    (tmp_path / name).write_bytes('\ufeff{"text": "x"}\n'.encode(encoding))
    line = refusal(tmp_path / name, encoding_errors="replace", skip_bad=True)
    assert line.startswith(f"{encoding[:6].upper()} text: {tmp_path}/{name}:1:1") and "iconv" in line


def test_binary_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ok\n\x7fELF\0\0")
    assert f"binary file, not text: {tmp_path}/a.txt:2" in refusal(tmp_path / "a.txt")
    (tmp_path / "a.exe").write_bytes(b"MZ")
    with pytest.raises(DataError, match="unknown kind of file"):
        Corpus([tmp_path / "a.exe"])
    with pytest.raises(DataError, match="no such file or folder"):
        Corpus([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no corpus files"):
        Corpus([tmp_path / "empty"])


def test_skip_bad_counts_lists_and_stops_above_a_thousandth(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in rows(2000)]
    lines[3], lines[1700] = "{", '{"other": 1}'
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    corpus = Corpus([path], Reading(skip_bad=True))
    assert len(list(corpus)) == 1998
    assert (corpus.rows, corpus.bad_rows) == (2000, 2)
    assert [f"{path}:4" in corpus.bad[0], f"{path}:1701" in corpus.bad[1]] == [True, True]
    assert len(list(corpus)) == 1998 and corpus.bad_rows == 2  # counts are of one reading
    lines[900] = "nonsense"
    path.write_text("\n".join(lines))
    line = refusal(path, skip_bad=True)
    assert f"too many bad rows: first not valid JSON: {path}:4 (got" in line and "Look at what wrote them" in line
    assert "got 3 of 2,000, expected at most 0.1 %" in line
    (tmp_path / "b.txt").write_bytes(b"\xe9")
    assert "--encoding-errors" not in refusal(tmp_path / "b.txt", skip_bad=True)  # one piece of advice in a line


def test_skip_bad_gives_up_early_on_a_hopeless_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("oops\n" * 1500)
    assert "got 1,001 of 1,001" in refusal(tmp_path / "a.jsonl", skip_bad=True)


@pytest.mark.parametrize("cut", [1, 9, 1000])
@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst", "txt.gz", "txt.zst", "parquet"])
def test_cut_packed_files(tmp_path: Path, ending: str, cut: int) -> None:
    made = rows(3000)
    path = tmp_path / f"a.{ending}"
    raw = "".join(json.dumps(row) + "\n" for row in made).encode()
    if ending == "parquet":
        pq.write_table(pa.table({"text": [row["text"] for row in made]}), path)
    else:
        path.write_bytes(gzip.compress(raw) if ending.endswith("gz") else zstandard.ZstdCompressor().compress(raw))
    texts(path)
    path.write_bytes(path.read_bytes()[:-cut])
    line = refusal(path, skip_bad=True)
    assert "cut short" in line and str(path) in line


def test_damaged_packed_files(tmp_path: Path) -> None:
    rng = random.Random(1)
    raw = "".join(json.dumps(row) + "\n" for row in rows(3000)).encode()
    table = pa.table({"text": [words(rng, 20) for _ in range(2000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=500)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(raw))
    for path, at in ((tmp_path / "a.parquet", 40), (tmp_path / "b.jsonl.gz", 5000), (tmp_path / "c.jsonl.zst", 5000)):
        content = bytearray(path.read_bytes())
        content[at : at + 64] = rng.randbytes(64)
        path.write_bytes(content)
        assert "damaged" in refusal(path) or "not valid JSON" in refusal(path), path
    assert "a.parquet row group 0" in refusal(tmp_path / "a.parquet")


def test_parquet_rows_are_named(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b", "c", None]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert "field 'text' is null" in (line := refusal(tmp_path / "a.parquet"))
    assert f"{tmp_path}/a.parquet row group 1 row 2" in line
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "b.parquet")
    assert "has no field 'text' (found: prompt)" in refusal(tmp_path / "b.parquet")
    pq.write_table(pa.table({"input_ids": [[1, 2], [3]]}), tmp_path / "c.parquet")
    found = [document.ids.tolist() for document in Corpus([tmp_path / "c.parquet"]) if document.ids is not None]
    assert found == [[1, 2], [3]]


def strings(*raw: bytes) -> pa.Array:
    """A column of strings that are whatever bytes they are."""
    made = pa.array(raw)
    return pa.StringArray.from_buffers(len(raw), made.buffers()[1], made.buffers()[2])


@pytest.mark.parametrize("column", [strings(b"ok", b"caf\xe9"), pa.array([b"ok", b"caf\xe9"])], ids=["text", "bytes"])
def test_parquet_text_is_decoded_as_any_other(tmp_path: Path, column: pa.Array) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column, "title": strings(b"one", b"tw\xff")}), path)
    assert f"not UTF-8: {path} row group 0 row 2:1:4 (got byte 0xe9)" in refusal(path)
    found = list(Corpus([path], Reading(encoding_errors="replace")))
    assert [document.text for document in found] == ["ok", "caf\ufffd"]
    assert [document.title for document in found] == ["one", "tw\ufffd"]
    write_jsonl(tmp_path / "b.jsonl", rows(1500))
    assert len(texts(path, tmp_path / "b.jsonl", skip_bad=True)) == 1501


@pytest.mark.parametrize(
    "column", [pa.array(["a", "b"], pa.string_view()), pa.array(["a", "b"]).dictionary_encode()], ids=["view", "codes"]
)
def test_parquet_strings_in_other_layouts(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"text": column, "id": [7, 8]}), tmp_path / "a.parquet")
    found = [(document.text, document.title) for document in Corpus([tmp_path / "a.parquet"])]
    assert found == [("a", "7"), ("b", "8")]


def test_parquet_columns_of_another_type_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array([1, 2], pa.timestamp("ms"))}), path)
    assert refusal(path) == f"field 'text' is timestamp[ms]: {path} (expected a string)"
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), path)
    assert refusal(path) == f"two fields are named 'text': {path}"
    pq.write_table(pa.table({"input_ids": [[0.5]]}), path)
    assert f"field 'input_ids' is list<element: double>: {path} (expected lists of token ids)" in refusal(path)


def test_parquet_page_checksums_are_verified(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["the quick brown fox"]})
    pq.write_table(table, path, write_page_checksum=True, compression="none", use_dictionary=False)
    assert texts(path) == ["the quick brown fox"]
    path.write_bytes(path.read_bytes().replace(b"brown", b"crown"))
    assert f"parquet file is damaged or cut short: {path} row group 0 (got" in refusal(path)


def test_long_lines(tmp_path: Path) -> None:
    long = '{"text": "' + "x" * (3 << 20) + '"}'
    lines = [json.dumps(row) for row in rows(1500)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*lines, long, *lines[:7]]))
    assert f"line longer than allowed: {path}:1501 (expected at most 2 MiB)" in refusal(path, max_line_mb=2)
    assert len(texts(path, max_line_mb=2, skip_bad=True)) == 1507  # the rest of the long line is passed over
    assert len(texts(path, max_line_mb=4)) == 1508
    (tmp_path / "b.txt").write_text("y" * (3 << 20))
    assert "text file longer than allowed" in refusal(tmp_path / "b.txt", max_line_mb=2)
    with pytest.raises(UsageError, match="no such line length"):
        Reading(max_line_mb=128)
    with pytest.raises(UsageError, match="no such choice"):
        Reading(encoding_errors="ignore")  # type: ignore[arg-type]


MEMORY = """
import sys
from sextant.core.errors import DataError
from sextant.data.corpus import Corpus, Reading
def peak():
    return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) << 10
before = peak()
try:
    print(sum(len(d.text) for d in Corpus([sys.argv[1]], Reading(max_line_mb=int(sys.argv[2])))), peak() - before)
except DataError as error:
    print(error.line().split(':')[0], peak() - before, sep=',')
"""


def test_a_line_of_100_mb_needs_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        file.write('{"text": "')
        for _ in range(100):
            file.write("the wind and " * ((1 << 20) // 13))
        file.write('"}')
    size = path.stat().st_size
    read, refused = (
        subprocess.run([sys.executable, "-c", MEMORY, path, limit], capture_output=True, text=True, check=True).stdout
        for limit in ("120", "64")
    )
    length, peak = map(int, read.split())
    assert length == size - 12 and peak < 4 * size
    what, peak = refused.split(",")
    assert what == "line longer than allowed" and int(peak) < 4 * (64 << 20)
