"""Byte-level BPE: training, any ``tokenizer.json``, bytes per token, and decoding as tokens arrive."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sextant.core.errors import DataError
from sextant.data.spec import MAX_VOCAB, MIN_VOCAB, SPECIAL

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = (
    "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "<|eot_id|>", "<|im_end|>", "[SEP]",
)
"""Names of the token that ends a document, tried in this order when the tokenizer's folder does not say."""

_PIECE = 1 << 16  # characters given to the library at once: bounds its memory and keeps odd text linear in time
_GROUP = 16  # pieces per library call
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how vocabularies with byte fallback spell a byte


class Tokenizer:
    """Text to ids and back.

    Text is always text: the name of a control token inside it is encoded letter by letter, never as that token.

    Attributes:
        vocab_size: highest id plus one; ids may have gaps.
        eot_id: the token that ends a document.
    """

    def __init__(self, text: str, *, eot: str | None = None, where: object = "tokenizer.json"):
        """Read the text of a ``tokenizer.json``.

        Raises:
            DataError: not a tokenizer, or no token that ends a document.
        """
        self._where = where
        self._inner = _parse(text, where)
        self.vocab_size = max(self._vocab.values()) + 1
        _refuse_many(self.vocab_size, where)
        self._json = json.loads(self._inner.to_str())
        self.eot = _end_of_text(self._vocab, eot, where)
        self.eot_id = self._vocab[self.eot]

    @classmethod
    def load(cls, path: str | Path, eot: str | None = None) -> Tokenizer:
        """Read a ``tokenizer.json``, or a folder that has one; ``eos_token`` of a config beside it names ``eot``.

        Raises:
            DataError: no such file, or one that is no tokenizer.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise DataError("cannot read the tokenizer", where=file, got=error.strerror or error) from None
        except UnicodeDecodeError as error:
            raise DataError("not a tokenizer.json", where=file, got=f"byte {error.start} is not UTF-8") from None
        return cls(text, eot=eot or _configured_eot(file.with_name("tokenizer_config.json")), where=file)

    @classmethod
    def train(cls, texts: Iterable[str], vocab: int) -> Tokenizer:
        """Learn merges from texts; the same texts give the same tokenizer. Little text may give fewer than ``vocab``.

        Raises:
            DataError: a vocabulary that cannot hold all bytes, or too large a one.
        """
        from tokenizers import Tokenizer as Inner
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if vocab < MIN_VOCAB:
            raise DataError("vocabulary too small for all bytes", got=vocab, expected=f"at least {MIN_VOCAB}")
        _refuse_many(vocab)
        inner = Inner(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=list(SPECIAL), show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        inner.train_from_iterator(chain.from_iterable(map(pieces, texts)), trainer)
        return cls(inner.to_str())

    # --- text to ids ------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without control tokens.

        Raises:
            DataError: the text has a lone surrogate, which UTF-8 cannot hold, or a word that the tokenizer lacks.
        """
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, uint32; errors as :meth:`encode`."""
        found: list[list[np.ndarray]] = [[] for _ in texts]
        for index, ids in self.encode_parts(texts):
            found[index].append(ids)
        return [np.concatenate(parts) for parts in found]

    def encode_parts(self, texts: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
        """Ids of texts as they are made: the number of a text and its next ids, at least once for each text.

        Little memory is used beside the texts, however long one is. Errors as :meth:`encode`.
        """
        cut = pieces if self.byte_level else _whole
        owners = ((index, piece) for index, text in enumerate(texts) for piece in cut(text))
        while group := list(islice(owners, _GROUP)):
            numbers, parts = zip(*group, strict=True)
            yield from zip(numbers, self._encode(parts), strict=True)

    def _encode(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        _refuse_surrogates(texts)
        with _refusals("the tokenizer cannot encode this text", self._where):
            encodings = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            ids = encoding.ids
            if not self._control.isdisjoint(ids):
                ids = self._spelled_out(text)
            yield np.array(ids, np.uint32)

    def _spelled_out(self, text: str) -> list[int]:
        """For models whose word list holds control tokens: cut their names, so that no word matches them."""
        names = "|".join(re.escape(name) for name in sorted(self._control_names, key=len, reverse=True))
        cut = re.split(f"(?={names})", text)
        parts = [part for piece in cut for part in _first_apart(piece, self._control_names)]
        with _refusals("the tokenizer cannot encode this text", self._where):
            ids = [self._inner.encode(part, add_special_tokens=False).ids for part in parts if part]
        return [i for i in chain.from_iterable(ids) if i not in self._control]

    # --- ids to text ------------------------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], special: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD. ``special=False`` leaves control tokens out.

        Raises:
            DataError: an id that is not in the vocabulary.
        """
        stream = StreamDecoder(self, special)
        return stream.feed(ids) + stream.finish()

    def token(self, index: int) -> str:
        """The vocabulary's entry, as the file spells it.

        Raises:
            DataError: no such id.
        """
        if index not in self._names:
            raise DataError("no such token", got=f"id {index}", expected=f"0 to {self.vocab_size - 1}")
        return self._names[index]

    @cached_property
    def token_bytes_P(self) -> np.ndarray:
        """int64 [P]: UTF-8 bytes that each token adds to a text; 0 for control tokens and unused ids."""
        sizes_P = np.zeros(self.vocab_size, np.int64)
        for index in self._names:
            if index not in self.special_ids:
                sizes_P[index] = len(self.bytes_of(index))
        return sizes_P

    def bytes_of(self, index: int) -> bytes:
        """Bytes that a token adds inside a text.

        For vocabularies that are not byte-level: what decoding yields after another token, so that a space which is
        dropped only at the start of a text counts.
        """
        name = self.token(index)
        if index in self._added:
            return name.encode()
        if self.byte_level:
            return b"".join(_BYTES.get(char) or char.encode() for char in name)
        if byte := _BYTE.fullmatch(name):
            return bytes.fromhex(byte[1])
        alone = self._inner.decode([self._anchor], skip_special_tokens=False)
        pair = self._inner.decode([self._anchor, index], skip_special_tokens=False)
        return pair[len(alone) :].encode()

    # --- the file ---------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Canonical text of ``tokenizer.json``: sorted keys, no spaces."""
        return json.dumps(self._json, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of :meth:`to_json`."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @cached_property
    def byte_level(self) -> bool:
        """Tokens stand for bytes, so any text can be cut anywhere and encoded."""
        return '"type": "ByteLevel"' in json.dumps(self._json["decoder"])

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens."""
        return frozenset(token["id"] for token in self._json["added_tokens"] if token["special"])

    @cached_property
    def _vocab(self) -> dict[str, int]:
        return self._inner.get_vocab(with_added_tokens=True)

    @cached_property
    def _names(self) -> dict[int, str]:
        return {index: name for name, index in self._vocab.items()}

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(token["id"] for token in self._json["added_tokens"])

    @cached_property
    def _control(self) -> frozenset[int]:
        """Control tokens that text must not yield: all but the one for unknown words."""
        unknown = self._json["model"].get("unk_token")
        unknown_id = self._json["model"].get("unk_id")
        return self.special_ids - {self._vocab.get(unknown, -1) if unknown else unknown_id}

    @cached_property
    def _control_names(self) -> list[str]:
        return [self._names[index] for index in self._control]

    @cached_property
    def _anchor(self) -> int:
        """An ordinary token, to decode others after."""
        return next(index for index, name in sorted(self._names.items()) if index not in self._added and name.isalpha())


class StreamDecoder:
    """Text as tokens arrive, never half a character: what was fed, joined, equals :meth:`Tokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer, special: bool = True):
        self._tokenizer, self._special = tokenizer, special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending: list[int] = []
        self._shown = ""

    def feed(self, ids: Iterable[int]) -> str:
        """The text that these ids complete.

        Raises:
            DataError: an id that is not in the vocabulary.
        """
        kept = [i for i in ids if self._special or i not in self._tokenizer.special_ids]
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"".join(map(self._tokenizer.bytes_of, kept)))
        return "".join(map(self._feed_words, kept))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"", final=True)
        return self._text()[len(self._shown) :]

    def _feed_words(self, index: int) -> str:
        """Decode a short window, because the words before decide about the space between."""
        self._tokenizer.token(index)
        self._pending.append(index)
        text = self._text()
        if text.endswith("\ufffd"):
            return ""
        new = text[len(self._shown) :]
        if new:
            self._pending = self._pending[self._last_word() :]
            self._shown = self._text()
        return new

    def _last_word(self) -> int:
        """Where the last token that is no single byte stands: bytes are decoded as one run with those before."""
        words = [at for at, index in enumerate(self._pending) if not _BYTE.fullmatch(self._tokenizer.token(index))]
        return words[-1] if words else 0

    def _text(self) -> str:
        return self._tokenizer._inner.decode(self._pending, skip_special_tokens=False)


def pieces(text: str) -> Iterator[str]:
    """Cut a long text where byte-level pre-tokenisers cut anyway: before the space that begins a word.

    Only a run of 65,536 characters without one is cut elsewhere; its ids may differ then, never its text.
    """
    start = 0
    while len(text) - start > _PIECE:
        end = _before_space(text, start, start + _PIECE)
        yield text[start:end]
        start = end
    yield text[start:]


def _before_space(text: str, start: int, end: int) -> int:
    cut = text.rfind(" ", start + 1, end)
    while cut > start:
        if not text[cut + 1].isspace():
            return cut
        cut = text.rfind(" ", start + 1, cut)
    return end


def _whole(text: str) -> Iterator[str]:
    yield text


def _parse(text: str, where: object) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Inner

    with _refusals("not a tokenizer.json", where):
        inner = Inner.from_str(text)
    if not inner.get_vocab_size():
        raise DataError("the tokenizer has no vocabulary", where=where)
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = True
    return inner


@contextmanager
def _refusals(what: str, where: object) -> Iterator[None]:
    """The library's errors as ours."""
    try:
        yield
    except BaseException as error:  # it raises plain Exception; a panic in it is not even that
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(what, where=where, got=str(error).partition("\n")[0][:80]) from None


def _refuse_many(vocab: int, where: object = "") -> None:
    if vocab > MAX_VOCAB:
        raise DataError("vocabulary too large", where=where, got=f"{vocab:,} ids", expected=f"at most {MAX_VOCAB:,}")


def _configured_eot(path: Path) -> str | None:
    """``eos_token`` of a ``tokenizer_config.json``, if there is one."""
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError("cannot read", where=path, got=str(error)[:80]) from None
    token = config.get("eos_token") if isinstance(config, dict) else None
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(token, str):
        raise DataError("eos_token is no text", where=path, got=repr(token)[:40])
    return token


def _end_of_text(vocab: dict[str, int], wanted: str | None, where: object) -> str:
    if wanted is not None and wanted not in vocab:
        raise DataError("the end-of-text token is not in the vocabulary", where=where, got=repr(wanted))
    found = wanted or next((name for name in END_OF_TEXT if name in vocab), None)
    if found is None:
        raise DataError(
            "the tokenizer has no end-of-text token", where=where, expected=f"one of {', '.join(END_OF_TEXT[:4])}",
            fix="Add one, or name it as eos_token in tokenizer_config.json",
        )
    return found


def _refuse_surrogates(texts: Sequence[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError("the text has a lone surrogate", where=f"character {error.start}") from None


def _first_apart(text: str, names: Sequence[str]) -> list[str]:
    """The first character by itself when the text starts with one of the names."""
    return [text[:1], text[1:]] if text.startswith(tuple(names)) else [text]


def _byte_alphabet() -> dict[str, bytes]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    chars = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return {char: bytes([byte]) for char, byte in chars.items()}


_BYTES = _byte_alphabet()
