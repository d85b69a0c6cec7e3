"""Prepared data on disk: what ``index.json`` says, and one split of it through memory maps.

A folder holds ``tokenizer.json``, ``index.json`` and, for each split, shards: ``train-00000.bin`` with token ids
(uint16 or uint32, little endian) and ``train-00000.idx.bin`` with int64 offsets where documents begin, and the end.
Each document ends with the end-of-text token.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from sextant.core.errors import DataError, UsageError
from sextant.core.spec import Spec
from sextant.data.tokenizer import Tokenizer

INDEX = "index.json"
SPLITS = ("train", "heldout")
AGAIN = "Run `sextant data prepare` again"

_VERIFY_BELOW = 1 << 30  # bytes of a folder that is hashed whenever it is opened
_OFFSET = np.dtype("<i8")
_SHOWN = 13  # characters of a bad value: 12 of a digest and its quote


class File(Spec):
    """Size and SHA-256 of a file."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Source(Spec):
    """A corpus file that was read."""

    path: str
    bytes: int
    sha256: str


class Split(Spec):
    """Counts of a split; ``bytes`` are of text (0 for documents that came as ids)."""

    shards: int = Field(ge=0)
    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    bytes: int = Field(ge=0)


class Index(Spec):
    """``index.json``: enough to use the folder, to notice damage, and to know where it came from."""

    schema_version: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    vocab: int = Field(ge=1)
    eot: str
    tokenizer: str = Field(description="digest of the tokenizer")
    seed: int
    heldout: float
    tokens_per_byte: float
    passed_over: int = Field(default=0, description="files of other kinds in the folders")
    empty: int = Field(description="documents without text, dropped")
    duplicates: int = Field(description="documents whose text occurred before, kept")
    bad_rows: int
    bad: tuple[str, ...] = Field(description="the first bad rows")
    splits: dict[Literal["train", "heldout"], Split]
    heldout_titles: tuple[str, ...] = Field(description="the first held-out documents")
    sources: tuple[Source, ...]
    files: dict[str, File]

    @classmethod
    def read(cls, folder: Path) -> Index:
        """The index of a prepared folder.

        Raises:
            DataError: no prepared folder, or a damaged index.
        """
        path = folder / INDEX
        try:
            return cls.parse(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            fix = "Make it with `sextant data prepare PATH... --out DIR`"
            raise DataError("no prepared data", where=folder, expected=f"a folder with {INDEX}", fix=fix) from None
        except (OSError, ValueError, RecursionError) as error:
            raise DataError("cannot read", where=path, got=str(error)[:80], fix=AGAIN) from None
        except UsageError as error:
            what, where = f"damaged index ({error.what})", f"{path} {error.where}".rstrip()
            raise DataError(what, where=where, got=error.got[:_SHOWN], fix=AGAIN) from None


def shard_name(split: str, number: int, ending: str) -> str:
    """``train-00000.bin`` for tokens, ``train-00000.idx.bin`` for offsets."""
    return f"{split}-{number:05d}{ending}"


def sha256(path: Path) -> str:
    """Digest of a file, hex.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError("cannot read", where=path, got=error.strerror or error) from None


class Shards:
    """One split of a prepared folder; ``len()`` counts documents.

    Attributes:
        index: what the folder says about itself.
        vocab, eot_id: of its tokenizer.
        lengths_N: int64 [N], tokens of each document, end-of-text included.
    """

    def __init__(self, folder: str | Path, split: str = "train", *, verify: bool | None = None):
        """Open and check a split: sizes always, SHA-256 of every file when ``verify`` (default: below 1 GiB).

        Raises:
            DataError: not prepared, changed since, or without this split.
        """
        self.folder, self.split = Path(folder), split
        self.index = Index.read(self.folder)
        counts = self.index.splits.get(split)  # type: ignore[call-overload]
        if counts is None or not counts.documents:
            raise DataError(f"no documents in split '{split}'", where=self.folder, fix=AGAIN)
        self.counts: Split = counts
        self._check_sizes()
        if verify or (verify is None and sum(file.bytes for file in self.index.files.values()) < _VERIFY_BELOW):
            self.verify()
        self._open()

    def __len__(self) -> int:
        return len(self.lengths_N)

    @property
    def tokens(self) -> int:
        """Tokens of the split, end-of-text tokens included."""
        return self.counts.tokens

    @property
    def digest(self) -> str:
        """Digest of the tokenizer that made the ids."""
        return self.index.tokenizer

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer.

        Raises:
            DataError: it is not the one that made the ids.
        """
        path = self.folder / "tokenizer.json"
        tokenizer = Tokenizer.load(path, self.index.eot)
        if tokenizer.digest != self.digest:
            got, expected = tokenizer.digest[:12], self.digest[:12]
            raise DataError("not the tokenizer that made the ids", where=path, got=got, expected=expected, fix=AGAIN)
        return tokenizer

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the split's tokens, from the digests of its files."""
        own = {name: file.sha256 for name, file in self.index.files.items() if name.startswith(f"{self.split}-")}
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()

    def document(self, number: int) -> np.ndarray:
        """int64 [n], all tokens of a document.

        Raises:
            DataError: an id outside the vocabulary, with its shard and position.
        """
        return self.read(number, 0, int(self.lengths_N[number]))

    def read(self, number: int, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start], tokens of a document from ``start`` to ``stop``; errors as :meth:`document`."""
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        at = int(self._offsets[shard][number - self._first[shard]])
        tokens = self._tokens[shard][at + start : at + stop].astype(np.int64)
        if tokens.size and tokens.max() >= self.index.vocab:
            self._refuse_id(shard, at + start, tokens)
        return tokens

    def verify(self) -> None:
        """Hash every file of the folder.

        Raises:
            DataError: the first file that changed.
        """
        for name, file in self.index.files.items():
            digest = sha256(self.folder / name)
            if digest != file.sha256:
                what = "file changed since it was prepared"
                raise DataError(
                    what, where=self.folder / name, got=f"sha256 {digest[:12]}", expected=file.sha256[:12], fix=AGAIN
                )

    def _check_sizes(self) -> None:
        for name, file in self.index.files.items():
            path = self.folder / name
            if path.name != name or not path.is_file():
                raise DataError("file is missing", where=path, fix=AGAIN)
            if path.stat().st_size != file.bytes:
                got, expected = f"{path.stat().st_size:,} bytes", f"{file.bytes:,}"
                what = "file changed since it was prepared"
                raise DataError(what, where=path, got=got, expected=expected, fix=AGAIN)

    def _open(self) -> None:
        dtype = np.dtype(self.index.dtype).newbyteorder("<")
        self._tokens, self._offsets, lengths, first = [], [], [], [0]
        for number in range(self.counts.shards):
            path = self.folder / shard_name(self.split, number, ".bin")
            offsets = self._map(path.with_suffix(".idx.bin"), _OFFSET)
            tokens = self._map(path, dtype)
            length_N = np.diff(offsets)
            if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(tokens) or length_N.min() < 1:
                raise DataError("offsets do not fit the tokens", where=path.with_suffix(".idx.bin"), fix=AGAIN)
            self._tokens.append(tokens)
            self._offsets.append(offsets)
            lengths.append(length_N)
            first.append(first[-1] + len(length_N))
        self._first = np.array(first[:-1])
        self.lengths_N = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
        if len(self.lengths_N) != self.counts.documents or self.lengths_N.sum() != self.counts.tokens:
            raise DataError("counts do not fit the shards", where=self.folder / INDEX, fix=AGAIN)

    def _map(self, path: Path, dtype: np.dtype) -> np.ndarray:
        if path.name not in self.index.files:
            raise DataError("shard is not in the index", where=path, fix=AGAIN)
        if not path.stat().st_size or path.stat().st_size % dtype.itemsize:
            raise DataError("shard is empty or cut", where=path, got=f"{path.stat().st_size} bytes", fix=AGAIN)
        return np.memmap(path, dtype, mode="r")

    def _refuse_id(self, shard: int, at: int, tokens: np.ndarray) -> None:
        position = int(np.argmax(tokens >= self.index.vocab))
        name = shard_name(self.split, shard, ".bin")
        raise DataError(
            f"{name} position {at + position:,} has id {tokens[position]:,}, vocab is {self.index.vocab:,}",
            where=self.folder, fix=AGAIN,
        )
