"""Text files to a folder of token shards, once; and the bundled corpus, prepared on first use.

The corpus is read two or three times: to survey it and choose what is held out, to train a tokenizer when none is
given (on training text alone), and to encode. The folder gets its name only when all of it is on the disk.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sextant.core import fs
from sextant.core.errors import DataError, SextantError, UsageError
from sextant.data.corpus import Corpus, Document, Reading, content_key
from sextant.data.dataset import INDEX, File, Index, Shards, Source, Split, sha256, shard_name
from sextant.data.order import mix
from sextant.data.progress import Progress
from sextant.data.spec import BOOKS, Data
from sextant.data.tokenizer import Tokenizer

SHARD_TOKENS = 1 << 27
TOKENIZER_BYTES = 1 << 30
"""Text that a tokenizer is trained on; of a larger corpus, a random sample of documents."""

_BATCH_BYTES = 4 << 20  # text that is encoded at a time
_TITLES = 1000  # held-out documents that are listed


# --- training data of a run -----------------------------------------------------------------------------------------


def opened(data: Data) -> tuple[Shards, Shards, Tokenizer]:
    """Training split, held-out split and tokenizer of a run's data; the bundled corpus is prepared if need be.

    Raises:
        DataError: the folder is not prepared, or changed since.
        EnvironmentFault: the cache folder cannot be written.
    """
    folder = bundled(data.vocab) if data.source == BOOKS else Path(data.source)
    train, heldout = Shards(folder, "train"), Shards(folder, "heldout", verify=False)
    return train, heldout, train.tokenizer


def bundled(vocab: int, seed: int = 0) -> Path:
    """The folder of the bundled corpus with a tokenizer of ``vocab`` ids; takes seconds the first time.

    It lies in ``$SEXTANT_CACHE``, else ``$XDG_CACHE_HOME/sextant``, else ``~/.cache/sextant``. A damaged one is made
    anew. ``seed`` chooses what is held out.

    Raises:
        EnvironmentFault: the cache folder cannot be written.
    """
    with resources.as_file(resources.files("sextant.data") / "books.jsonl.gz") as corpus:
        folder = cache_folder() / f"{BOOKS}-1-{vocab}-{seed}-{sha256(corpus)[:12]}"
        if _sound(folder):
            return folder
        fs.make_folder(folder.parent)
        with _turn(folder.with_name(f"{folder.name}.lock")):
            if not _sound(folder):
                if folder.exists():
                    fs.remove_tree_safely(folder)
                prepare([corpus], folder, vocab=vocab, seed=seed, quiet=True)
    return folder


def cache_folder() -> Path:
    """Where prepared data is kept between runs."""
    if own := os.environ.get("SEXTANT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sextant"


def _sound(folder: Path) -> bool:
    try:
        Shards(folder, "train", verify=True)
        Shards(folder, "heldout", verify=False)
    except SextantError:
        return False
    return True


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Wait until no other process prepares the same folder."""
    lock = fs.Lock(path)
    while True:
        try:
            lock.take(f"{os.getpid()}")
            break
        except BlockingIOError:
            time.sleep(0.1)
    try:
        yield
    finally:
        lock.release()


# --- preparation ----------------------------------------------------------------------------------------------------


def prepare(
    paths: Iterable[str | Path], out: str | Path, *, vocab: int = 4096, tokenizer: Tokenizer | None = None,
    heldout: float = 0.05, seed: int = 0, reading: Reading | None = None, quiet: bool = False,
) -> Index:
    """Encode a corpus into ``out``, which must not exist yet; returns what ``index.json`` says.

    Args:
        paths: files and folders, see :mod:`sextant.data.corpus`.
        vocab: ids of the tokenizer to train when none is given.
        tokenizer: the tokenizer to use.
        heldout: share of bytes to hold out, in whole documents; a corpus of one document is cut in two.
        seed: chooses the documents that are held out.

    Raises:
        DataError: the corpus cannot be used as it is.
        UsageError: ``out`` is taken, or a share that makes no sense.
        EnvironmentFault: ``out`` cannot be written.
    """
    out = Path(out)
    if not 0 < heldout <= 0.5:
        raise UsageError("no such share", where="--heldout", got=heldout, expected="above 0, at most 0.5")
    if out.name == ".." or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UsageError("the folder is taken", where=out, fix="Name another --out, or delete it first")
    corpus = Corpus(paths, reading)
    sources = tuple(_source(file) for file in corpus.files)
    survey = Survey.of(corpus, heldout, seed, quiet)
    if tokenizer is None:
        tokenizer = Tokenizer.train(_training_texts(corpus, survey, heldout, quiet), vocab)
    with fs.folder_aside(out) as folder:
        writers = {name: _Writer(folder, name, tokenizer) for name in ("train", "heldout")}
        titles = _encode(corpus, survey, heldout, tokenizer, writers, quiet)
        index = _index(folder, corpus, survey, tokenizer, writers, sources, titles, heldout=heldout, seed=seed)
        if out.exists():
            out.rmdir()
        fs.publish(folder, out)
    return index


@dataclass(frozen=True)
class Survey:
    """A first look at the corpus: 16 bytes for each of its N documents.

    Attributes:
        keys_N: uint64, content of each document, abbreviated.
        sizes_N: int64, bytes.
        heldout_N: bool, chosen for the held-out split; equal documents go the same way.
        duplicates: documents whose content came before.
    """

    keys_N: np.ndarray
    sizes_N: np.ndarray
    heldout_N: np.ndarray
    duplicates: int

    @classmethod
    def of(cls, corpus: Corpus, share: float, seed: int, quiet: bool) -> Survey:
        """Read everything once.

        Raises:
            DataError: the corpus cannot be read, or has nothing that could be held out.
        """
        keys, sizes = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        count = 0
        with Progress("reading", quiet=quiet) as progress:
            for document in _documents(corpus, share):
                if count == len(keys):
                    keys, sizes = np.resize(keys, 2 * count + 64), np.resize(sizes, 2 * count + 64)
                keys[count], sizes[count] = document.key, _weight(document)
                count += 1
                progress.add(document.size)
        keys, sizes = keys[:count].copy(), sizes[:count].copy()
        groups, group_N = np.unique(keys, return_inverse=True)
        if len(groups) < 2:
            raise DataError("all documents are the same", where=corpus.files[0], fix="Nothing could be held out")
        chosen = choose(np.bincount(group_N, sizes), mix(groups, "heldout", seed), share)
        return cls(keys, sizes, chosen[group_N], count - len(groups))


def choose(sizes_N: np.ndarray, rank_N: np.ndarray, share: float) -> np.ndarray:
    """Bool [N]: which documents to hold out, in order of ``rank_N``, until their bytes are nearest to ``share``.

    At least one (the smallest when each would be too much), never all.
    """
    order = np.argsort(rank_N, kind="stable")[: len(sizes_N) - 1]
    target = share * sizes_N.sum()
    sums = np.concatenate([[0.0], np.cumsum(sizes_N[order])])
    count = int(np.argmin(np.abs(sums - target)))
    chosen_N = np.zeros(len(sizes_N), bool)
    chosen_N[order[:count] if count else [int(np.argmin(sizes_N))]] = True
    return chosen_N


def _documents(corpus: Corpus, share: float) -> Iterator[Document]:
    """The corpus; one that is a single document is cut in two, so that a part can be held out."""
    documents = iter(corpus)
    first = next(documents)
    second = next(documents, None)
    if second is None:
        yield from _cut(first, share)
        return
    yield first
    yield second
    yield from documents


def _cut(document: Document, share: float) -> Iterator[Document]:
    """Body and tail, at a line's end where there is one."""
    whole = document.text if document.ids is None else document.ids
    at = round(len(whole) * (1 - share))
    if document.ids is None:
        at = document.text.rfind("\n", len(whole) // 4, at) + 1 or at
    if not 0 < at < len(whole):
        raise DataError("one short document is too little data", where=document.where, fix="Give more text")
    for name, part in (("start", slice(0, at)), ("end", slice(at, None))):
        ids = None if document.ids is None else document.ids[part]
        raw = document.text[part].encode() if ids is None else ids.tobytes()
        title, size = f"{document.title} ({name})", len(raw) if ids is None else 0
        yield replace(document, text=document.text[part], ids=ids, title=title, size=size, key=content_key(raw))


def _weight(document: Document) -> int:
    return document.size if document.ids is None else document.ids.nbytes


def _training_texts(corpus: Corpus, survey: Survey, share: float, quiet: bool) -> Iterator[str]:
    """Texts for the tokenizer: training documents, of a large corpus a sample."""
    wanted = ~survey.heldout_N
    total = int(survey.sizes_N[wanted].sum())
    part = min(1.0, TOKENIZER_BYTES / max(1, total))
    wanted &= mix(survey.keys_N, "tokenizer") <= np.uint64(part * (2**64 - 2**12))
    with Progress("training the tokenizer", quiet=quiet) as progress:
        for number, document in enumerate(_documents(corpus, share)):
            if document.ids is not None:
                fix = "Name the tokenizer that made them with --tokenizer"
                raise DataError("the corpus holds token ids", where=document.where, fix=fix)
            if number < len(wanted) and wanted[number]:
                progress.add(document.size)
                yield document.text


def _encode(
    corpus: Corpus, survey: Survey, share: float, tokenizer: Tokenizer, writers: dict[str, _Writer], quiet: bool
) -> list[str]:
    """Write every document to its split; titles of the first held-out ones."""
    titles: list[str] = []
    count = 0
    with Progress("encoding", int(survey.sizes_N.sum()), quiet) as progress:
        for batch in _batches(_documents(corpus, share)):
            for document, parts in zip(batch, _ids(batch, tokenizer), strict=True):
                if count >= len(survey.keys_N) or document.key != survey.keys_N[count]:
                    raise DataError("the file changed while it was read", where=document.where, fix="Run it again")
                split = "heldout" if survey.heldout_N[count] else "train"
                writers[split].document(parts, document)
                if split == "heldout" and len(titles) < _TITLES:
                    titles.append(document.title)
                count += 1
                progress.add(document.size)
    if count != len(survey.keys_N):
        raise DataError("a file changed while it was read", where=corpus.files[0], fix="Run it again")
    return titles


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += _weight(document)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _ids(batch: list[Document], tokenizer: Tokenizer) -> Iterator[Iterator[np.ndarray]]:
    """For each document its ids in parts, to be used up in turn."""
    encoded = groupby(tokenizer.encode_parts([document.text for document in batch]), key=lambda part: part[0])
    for document, (_, parts) in zip(batch, encoded, strict=True):
        yield iter([_checked(document, tokenizer)]) if document.ids is not None else (ids for _, ids in parts)


def _checked(document: Document, tokenizer: Tokenizer) -> np.ndarray:
    ids = document.ids
    if ids is None or ids.max() >= tokenizer.vocab_size:
        got = "none" if ids is None else f"{ids.max():,}"
        raise DataError("token id outside the vocabulary", where=document.where, got=got, expected=tokenizer.vocab_size)
    return ids


class _Writer:
    """Shards of one split as they grow."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer):
        self._folder, self._split, self._eot = folder, split, tokenizer.eot_id
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._offsets = [0]
        self.files: dict[str, File] = {}
        self.shards, self.documents, self.tokens, self.bytes = 0, 0, 0, 0

    def document(self, parts: Iterable[np.ndarray], document: Document) -> None:
        """Add a document and the end-of-text token, unless its ids bring one."""
        # A token is at least a byte of text, but for the few that mark a beginning or the end.
        bound = _weight(document) + 16
        if self._file is not None and self._offsets[-1] + bound > SHARD_TOKENS:
            self.finish()
        length, last = 0, -1
        for ids in parts:
            self._write(ids)
            length, last = length + len(ids), int(ids[-1]) if len(ids) else last
        if last != self._eot:
            self._write(np.array([self._eot]))
            length += 1
        self._offsets.append(self._offsets[-1] + length)
        self.documents, self.tokens, self.bytes = self.documents + 1, self.tokens + length, self.bytes + document.size

    def finish(self) -> None:
        """Close the shard that is open and write its offsets."""
        if self._file is None:
            return
        self._file.close()
        name = shard_name(self._split, self.shards, ".bin")
        self.files[name] = File(bytes=self._offsets[-1] * self._dtype.itemsize, sha256=self._hash.hexdigest())
        offsets = shard_name(self._split, self.shards, ".idx.bin")
        written = fs.write_stream(self._folder / offsets, [np.array(self._offsets, "<i8").tobytes()])
        self.files[offsets] = File(bytes=written.bytes, sha256=written.sha256)
        self._file, self._hash, self._offsets = None, hashlib.sha256(), [0]
        self.shards += 1

    def _write(self, ids: np.ndarray) -> None:
        with fs.guard(f"writing {self._folder}", self._folder):
            if self._file is None:
                self._file = (self._folder / shard_name(self._split, self.shards, ".bin")).open("wb")
            raw = ids.astype(self._dtype).tobytes()
            self._hash.update(raw)
            self._file.write(raw)


def _index(
    folder: Path, corpus: Corpus, survey: Survey, tokenizer: Tokenizer, writers: dict[str, _Writer],
    sources: tuple[Source, ...], titles: list[str], *, heldout: float, seed: int,
) -> Index:
    """Close the shards, write tokenizer and index."""
    files: dict[str, File] = {}
    splits = {}
    for name, writer in writers.items():
        writer.finish()
        files |= writer.files
        splits[name] = Split(
            shards=writer.shards, documents=writer.documents, tokens=writer.tokens, bytes=writer.bytes
        )
    written = fs.write_stream(folder / "tokenizer.json", [tokenizer.to_json().encode()])
    files["tokenizer.json"] = File(bytes=written.bytes, sha256=written.sha256)
    tokens, size = (sum(getattr(split, name) for split in splits.values()) for name in ("tokens", "bytes"))
    index = Index(
        dtype="uint16" if tokenizer.vocab_size <= 2**16 else "uint32", vocab=tokenizer.vocab_size, eot=tokenizer.eot,
        tokenizer=tokenizer.digest, seed=seed, heldout=heldout, tokens_per_byte=tokens / size if size else 0.0,
        passed_over=corpus.passed_over, empty=corpus.empty, duplicates=survey.duplicates, bad_rows=corpus.bad_rows,
        bad=tuple(corpus.bad), splits=splits, heldout_titles=tuple(titles), sources=sources, files=files,
    )
    fs.write_stream(folder / INDEX, [fs.json_text(index.to_dict()).encode()])
    return index


def _source(file: Path) -> Source:
    return Source(path=str(file), sha256=sha256(file), bytes=file.stat().st_size)
