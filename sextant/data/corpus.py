"""Documents from files: ``.txt`` and ``.md``, ``.jsonl``, ``.parquet``, plain or packed with gzip or zstd.

Reading streams: memory is bounded by one line (or one document of plain text), whatever the size of a file. A problem
names its file, line and byte. A packed file that ends early is an error, never a shorter corpus.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import numpy as np

from sextant.core.errors import DataError, EnvironmentFault, UsageError

TEXT, LINES, TABLES, PACKED = (".txt", ".md"), (".jsonl",), (".parquet",), (".gz", ".zst")
KINDS = f"{', '.join((*TEXT, *LINES))} (also {' or '.join(PACKED)}), {', '.join(TABLES)}"

MAX_BAD_SHARE = 0.001
_LISTED = 20  # bad rows that are listed
_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}
_UTF8_MARK = b"\xef\xbb\xbf"
_SURROGATE = re.compile("[\ud800-\udfff]")
_NAMES = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object", type(None): "null"}


@dataclass(frozen=True)
class Reading:
    """How to read.

    Attributes:
        text_field: field of a row that holds the text.
        skip_bad: leave bad rows out and list them; more than 0.1 % is an error all the same.
        encoding_errors: ``replace`` puts U+FFFD where a byte is no UTF-8, ``strict`` stops there.
        max_line_mb: longest line, or text file, in MiB; below 128, so that a document fits into a shard.
    """

    text_field: str = "text"
    skip_bad: bool = False
    encoding_errors: Literal["strict", "replace"] = "strict"
    max_line_mb: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.max_line_mb < 128:
            raise UsageError("no such line length", where="--max-line-mb", got=self.max_line_mb, expected="1 to 127")
        if self.encoding_errors not in ("strict", "replace"):
            expected = "strict or replace"
            raise UsageError("no such choice", where="--encoding-errors", got=self.encoding_errors, expected=expected)

    @property
    def max_line(self) -> int:
        """Bytes."""
        return self.max_line_mb << 20


@dataclass(frozen=True)
class Document:
    """A text, or ids that another tokenizer run made of one.

    Attributes:
        where: ``path:line``, or the path of a text file.
        title: the row's ``title`` or ``id``, else ``where``.
        size: UTF-8 bytes of the text; 0 for ids.
        key: 64 bits of the SHA-256 of the content.
    """

    text: str
    ids: np.ndarray | None
    where: str
    title: str
    size: int
    key: int


class _BadRow(DataError):
    """One row that cannot be used; ``skip_bad`` passes over it."""


class Corpus:
    """All documents of some files and folders, in a fixed order; each iteration reads them anew.

    Attributes:
        files: what is read; folders are walked in order of names.
        passed_over: files of other kinds in those folders.
        rows, empty, bad_rows: counts of the iteration so far.
        bad: the first bad rows, as messages.
    """

    def __init__(self, paths: Iterable[str | Path], reading: Reading | None = None):
        """Find the files.

        Raises:
            DataError: no such path, no corpus file in a folder, or a file of an unknown kind.
        """
        self.reading = reading or Reading()
        found = [_find(Path(path)) for path in paths]
        self.files = tuple(dict.fromkeys(file for files, _ in found for file in files))
        self.passed_over = sum(others for _, others in found)
        self._forget()

    def __iter__(self) -> Iterator[Document]:
        """Documents that have text; empty ones are counted only.

        Raises:
            DataError: the first problem, with file and line; or too many bad rows.
        """
        self._forget()
        found = 0
        for file in self.files:
            before = found
            for document in self._documents(file):
                found += 1
                yield document
            if found == before and _kind(file) not in TEXT:
                raise DataError(f"{file} has no documents", fix="Remove the file, or look at what wrote it")
        self._refuse_too_many(at_end=True)
        if not found:
            raise DataError(f"{self.files[0]} has no documents", fix="Give files that have text")

    def _forget(self) -> None:
        self.rows, self.empty, self.bad_rows = 0, 0, 0
        self.bad: list[str] = []

    def _documents(self, file: Path) -> Iterator[Document]:
        for row in _READERS[_kind(file)](file, self.reading):
            self.rows += 1
            try:
                document = row.document(self.reading)
            except _BadRow as error:
                self._note(error)
                continue
            if document is None:
                self.empty += 1
            else:
                yield document

    def _note(self, error: _BadRow) -> None:
        if not self.reading.skip_bad:
            raise error
        self.bad_rows += 1
        if len(self.bad) < _LISTED:
            self.bad.append(error.line().removesuffix(f". {error.fix}"))
        self._refuse_too_many(at_end=False)

    def _refuse_too_many(self, at_end: bool) -> None:
        """Judged at the end, or early when a thousand bad rows leave little doubt."""
        if self.bad_rows > MAX_BAD_SHARE * self.rows and (at_end or self.bad_rows > 1000):
            raise DataError(
                "too many bad rows", where=f"first {self.bad[0]}", got=f"{self.bad_rows:,} of {self.rows:,}",
                expected="at most 0.1 %", fix="Look at what wrote them",
            )


# --- files ----------------------------------------------------------------------------------------------------------


def _find(path: Path) -> tuple[list[Path], int]:
    """The files to read, and how many of other kinds lie beside them in a folder."""
    if path.is_file():
        _kind(path)
        return [path], 0
    if not path.is_dir():
        raise DataError("no such file or folder", where=path)
    inner = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
    files = [file for file in inner if _known(file)]
    if not files:
        raise DataError("the folder has no corpus files", where=path, expected=KINDS)
    return files, len(inner) - len(files)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _known(path: Path) -> bool:
    packed = path.suffix.lower() in PACKED
    ending = _ending(path)
    return ending in (*TEXT, *LINES) or (ending in TABLES and not packed)


def _ending(path: Path) -> str:
    """In small letters, under the packing."""
    return Path(path.stem if path.suffix.lower() in PACKED else path.name).suffix.lower()


def _kind(path: Path) -> str:
    """The ending that says how to read a file, such as ``.jsonl`` for ``a.jsonl.zst``."""
    if not _known(path):
        raise DataError("unknown kind of file", where=path, got=repr(path.suffix), expected=KINDS)
    return _ending(path)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The unpacked bytes of a file; what is wrong with the packing leaves as a :class:`DataError`."""
    try:
        with path.open("rb") as raw, _unpacked(path, raw) as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError("gzip file is damaged or cut short", where=path, got=str(error)[:80]) from None
    except OSError as error:
        raise DataError("cannot read", where=path, got=error.strerror or error) from None


def _unpacked(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(raw, "rb")  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_Zstd(path, raw), 1 << 20)
    return io.BufferedReader(raw, 1 << 20)  # type: ignore[arg-type]


class _Zstd(io.RawIOBase):
    """Unpacked bytes of a zstd file; unlike the library's reader it notices when the last frame is cut short."""

    _STEP = 1 << 10  # packed bytes at a time: a frame may unpack to 32,000 times its size

    def __init__(self, path: Path, raw: IO[bytes]):
        self._path, self._raw = path, raw
        self._library = _optional("zstandard")
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._raw.read(self._STEP)
            if not packed:
                if self._frame is not None:
                    raise DataError("zstd file is cut short", where=self._path)
                return 0
            self._ready = memoryview(self._unpack(packed))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _unpack(self, packed: bytes) -> bytes:
        parts = []
        try:
            while packed:
                self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
                parts.append(self._frame.decompress(packed))
                packed = self._frame.unused_data if self._frame.eof else b""
                self._frame = None if self._frame.eof else self._frame
        except self._library.ZstdError as error:
            raise DataError("zstd file is damaged", where=self._path, got=str(error)[:80]) from None
        return b"".join(parts)


def _optional(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        fix = "Install it with: pip install 'sextant-lm[data]'"
        raise EnvironmentFault(f"reading this file needs {module.split('.')[0]}", fix=fix) from None


# --- rows -----------------------------------------------------------------------------------------------------------


class _Row(Protocol):
    """Something read that may be a document."""

    def document(self, reading: Reading) -> Document | None:
        """The document, or None when it is empty.

        Raises:
            _BadRow: it cannot be used.
        """
        ...


@dataclass(frozen=True)
class _Text:
    """A whole text file."""

    path: Path
    raw: bytes

    def document(self, reading: Reading) -> Document | None:
        raw = self.raw.removeprefix(_UTF8_MARK)
        if b"\0" in raw:
            at = raw.index(b"\0")
            raise _BadRow("binary file, not text", where=f"{self.path}:{raw.count(10, 0, at) + 1}", got="a NUL byte")
        return _from_text(_decode(raw, str(self.path), 1, reading), str(self.path), {}, reading)


@dataclass(frozen=True)
class _Line:
    """A line of JSON."""

    path: Path
    number: int
    raw: bytes

    def document(self, reading: Reading) -> Document | None:
        where = f"{self.path}:{self.number}"
        if len(self.raw) > reading.max_line:
            raise _too_long("line", where, reading)
        # Nested, so that at most three copies of a long line exist at a time.
        return _from_row(_json(_decode(self.raw, str(self.path), self.number, reading), where), where, reading)


@dataclass(frozen=True)
class _Record:
    """A row of a table; its texts are still bytes."""

    where: str
    fields: dict[str, Any]

    def document(self, reading: Reading) -> Document | None:
        fields = {
            name: _decode(value, self.where, 1, reading) if isinstance(value, bytes) else value
            for name, value in self.fields.items()
        }
        return _from_row(fields, self.where, reading)


def _read_text(path: Path, reading: Reading) -> Iterator[_Row]:
    with _opened(path) as file:
        raw = file.read(reading.max_line + 1)
    _refuse_wide(raw, path)
    if len(raw) > reading.max_line:
        raise _too_long("text file", str(path), reading)
    yield _Text(path, raw)


def _read_lines(path: Path, reading: Reading) -> Iterator[_Row]:
    """Lines with something on them; of one that is too long, only as much as proves it."""
    with _opened(path) as file:
        number = 0
        while raw := file.readline(reading.max_line + 1):
            number += 1
            if number == 1:
                _refuse_wide(raw, path)
                raw = raw.removeprefix(_UTF8_MARK)
            whole = raw.endswith(b"\n")
            raw = raw.rstrip(b"\r\n")
            if raw and not raw.isspace():
                yield _Line(path, number, raw)
            while raw and not whole:
                raw = file.readline(reading.max_line + 1)
                whole = raw.endswith(b"\n")


def _read_table(path: Path, reading: Reading) -> Iterator[_Row]:
    parquet, arrow = _optional("pyarrow.parquet"), _optional("pyarrow")
    group = "footer"
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as table:
            columns = _columns(table.schema_arrow, arrow.types, path, reading)
            for number in range(table.num_row_groups):
                group = f"row group {number}"
                batches = table.iter_batches(256, row_groups=[number], columns=columns)
                rows = (fields for batch in batches for fields in _rows(batch, arrow))
                for row, fields in enumerate(rows, start=1):
                    yield _Record(f"{path} row group {number} row {row}", fields)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        got = next(iter(str(error).splitlines()), "")[:80]
        raise DataError("parquet file is damaged or cut short", where=f"{path} {group}", got=got) from None


def _columns(schema: Any, kinds: Any, path: Path, reading: Reading) -> list[str]:
    """What to read of a table: the text or the ids, and short fields that name a document."""
    types = dict(zip(schema.names, schema.types, strict=True))
    main = reading.text_field if reading.text_field in types else "input_ids"
    if main not in types:
        raise _no_field(path, types, reading)
    fits, expected = (_textual, "a string") if main == reading.text_field else (_listing, "lists of token ids")
    if not fits(types[main], kinds):
        raise DataError(f"field '{main}' is {str(types[main])[:40]}", where=path, expected=expected)
    labels = [name for name in ("title", "id") if name in types and _label(types[name], kinds)]
    wanted = list(dict.fromkeys([main, *labels]))
    for name in wanted:
        if schema.names.count(name) > 1:
            raise DataError(f"two fields are named '{name}'", where=path)
    return wanted


def _textual(kind: Any, kinds: Any) -> bool:
    """Strings and bytes in any of their layouts; a column of nothing but nulls has no type of its own."""
    kind = getattr(kind, "storage_type", kind)
    kind = kind.value_type if kinds.is_dictionary(kind) else kind
    layouts = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "fixed_size_binary")
    return any(getattr(kinds, f"is_{layout}")(kind) for layout in (*layouts, "null"))


def _listing(kind: Any, kinds: Any) -> bool:
    lists = (kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list)
    return any(is_list(kind) for is_list in lists) and kinds.is_integer(kind.value_type)


def _label(kind: Any, kinds: Any) -> bool:
    return kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_integer(kind)


def _rows(batch: Any, arrow: Any) -> Iterator[dict[str, Any]]:
    """Strings as bytes: a file may hold any under that name, and only we know what to do with those that are none."""
    columns = [
        (column.cast(arrow.large_binary()) if _textual(column.type, arrow.types) else column).to_pylist()
        for column in batch.columns
    ]
    for values in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, values, strict=True))


_READERS = {".txt": _read_text, ".md": _read_text, ".jsonl": _read_lines, ".parquet": _read_table}


def _too_long(what: str, where: str, reading: Reading) -> _BadRow:
    expected = f"at most {reading.max_line_mb} MiB"
    return _BadRow(f"{what} longer than allowed", where=where, expected=expected, fix="Split it, or set --max-line-mb")


def _refuse_wide(raw: bytes, path: Path) -> None:
    for mark, name in _MARKS.items():
        if raw.startswith(mark):
            fix = f"Convert it: iconv -f {name} -t UTF-8"
            raise DataError(f"{name} text", where=f"{path}:1:1", expected="UTF-8", fix=fix)


def _decode(raw: bytes, path: str, line: int, reading: Reading) -> str:
    try:
        return raw.decode("utf-8", reading.encoding_errors)
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise _BadRow(
            "not UTF-8", where=f"{path}:{line}:{column}", got=f"byte 0x{raw[error.start]:02x}",
            fix="Convert the file, or use --encoding-errors replace",
        ) from None


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise _BadRow("not valid JSON", where=where, got=f"{error.msg} at character {error.pos + 1}") from None
    except (RecursionError, ValueError) as error:
        raise _BadRow("not valid JSON", where=where, got=str(error)[:60]) from None
    if not isinstance(row, dict):
        raise _BadRow("the row is no object", where=where, got=_name(row), expected='{"text": ...}')
    return row


def _from_row(fields: dict[str, Any], where: str, reading: Reading) -> Document | None:
    field = reading.text_field
    if field in fields:
        text = fields[field]
        if not isinstance(text, str):
            raise _BadRow(f"field '{field}' is {_name(text)}", where=where, expected="a string")
        return _from_text(text, where, fields, reading)
    if "input_ids" in fields:
        return _from_ids(fields["input_ids"], where, fields)
    raise _no_field(where, fields, reading)


def _no_field(where: object, fields: Iterable[str], reading: Reading) -> _BadRow:
    found = ", ".join(map(str, list(fields)[:6])) or "none"
    return _BadRow(f"{where} has no field '{reading.text_field}' (found: {found[:80]})", fix="Set --text-field")


def _from_text(text: str, where: str, fields: dict[str, Any], reading: Reading) -> Document | None:
    if not text.strip():
        return None
    try:
        raw = text.encode()
    except UnicodeEncodeError as error:
        if reading.encoding_errors == "strict":
            got = f"U+{ord(text[error.start]):04X} at character {error.start + 1} of the text"
            raise _BadRow("lone surrogate", where=where, got=got, fix="Use --encoding-errors replace") from None
        text = _SURROGATE.sub("\ufffd", text)
        raw = text.encode()
    if len(raw) > reading.max_line:
        raise _too_long("text", where, reading)
    return Document(text, None, where, _title(fields, where), len(raw), content_key(raw))


def _from_ids(ids: Any, where: str, fields: dict[str, Any]) -> Document | None:
    whole = isinstance(ids, list) and all(type(i) is int and 0 <= i < 2**32 for i in ids)
    if not whole:
        raise _BadRow("field 'input_ids' is no list of token ids", where=where, got=_name(ids))
    array = np.array(ids, np.uint32)
    return Document("", array, where, _title(fields, where), 0, content_key(array.tobytes())) if ids else None


def _title(fields: dict[str, Any], where: str) -> str:
    title = fields.get("title") or fields.get("id")
    return str(title)[:200] if isinstance(title, str | int) else where


def content_key(raw: bytes) -> int:
    """64 bits of the SHA-256: equal content, equal key."""
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "little")


def _name(value: Any) -> str:
    return _NAMES.get(type(value), "a string")
