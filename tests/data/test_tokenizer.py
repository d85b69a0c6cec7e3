"""Text to ids and back: any text survives, control tokens never come from text, decoding in steps equals at once."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_texts import words
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers, trainers

from sextant.core.errors import DataError
from sextant.data import tokenizer as tokenizer_module
from sextant.data.spec import MIN_VOCAB, SPECIAL
from sextant.data.tokenizer import StreamDecoder, Tokenizer, pieces


def sample_texts(count: int = 200) -> list[str]:
    rng = random.Random(5)
    return [words(rng, 40) for _ in range(count)]


BYTES = Tokenizer.train(sample_texts(), 300)
any_text = st.text(st.characters(exclude_categories=("Cs",)), max_size=200)
with_control = st.lists(st.one_of(any_text, st.sampled_from(SPECIAL)), max_size=6).map("".join)


def unigram() -> Tokenizer:
    """A vocabulary that is not byte-level, whose word list holds its control tokens."""
    inner = Inner(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    names = ["<unk>", "</s>"]
    inner.train_from_iterator(
        ["sail the wind and the mast </s> s/<>"] * 3,
        trainers.UnigramTrainer(vocab_size=40, special_tokens=names, unk_token="<unk>", show_progress=False),
    )
    return Tokenizer(inner.to_str())


def byte_fallback() -> Tokenizer:
    """In the manner of SentencePiece: word marks, and bytes for what the vocabulary lacks."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"sailthewnd", "▁s", "ai"]
    vocab = {name: index for index, name in enumerate(names)}
    inner = Inner(models.BPE(vocab, [("▁", "s"), ("a", "i")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(inner.to_str())


@given(with_control)
def test_any_text_comes_back(text: str) -> None:
    assert BYTES.decode(BYTES.encode(text)) == text


@given(with_control)
def test_bytes_of_tokens_add_up(text: str) -> None:
    assert BYTES.token_bytes_P[BYTES.encode(text)].sum() == len(text.encode())


@given(st.lists(st.integers(0, BYTES.vocab_size - 1), max_size=60), st.integers(1, 5), st.booleans())
def test_decoding_in_steps_equals_at_once(ids: list[int], step: int, special: bool) -> None:
    stream = StreamDecoder(BYTES, special)
    parts = [stream.feed(ids[i : i + step]) for i in range(0, len(ids), step)]
    assert "".join([*parts, stream.finish()]) == BYTES.decode(ids, special)
    kept = [i for i in ids if special or i not in BYTES.special_ids]
    assert BYTES.decode(ids, special) == BYTES._inner.decode(kept, skip_special_tokens=False)


@given(any_text)
def test_streams_never_emit_half_a_character(text: str) -> None:
    stream = StreamDecoder(BYTES)
    parts = [stream.feed([i]) for i in BYTES.encode(text)]
    assert "".join(parts) == text
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text


def test_control_tokens_are_never_read_from_text() -> None:
    for tokenizer in (BYTES, unigram(), byte_fallback()):
        for name in [tokenizer.token(i) for i in sorted(tokenizer.special_ids)]:
            for text in (name, f"sail {name}", f"sail{name}{name} the"):
                found = set(tokenizer.encode(text)) & tokenizer.special_ids
                assert found <= {tokenizer._vocab.get("<unk>")}, (name, text)


def test_names_of_control_tokens_are_encoded_like_other_text() -> None:
    text = "sail <|endoftext|><|im_start|>the<|im_end|>"
    tokenizer = Tokenizer.train([text] * 20, 320)  # merges inside the names
    plain = json.loads(tokenizer.to_json()) | {"added_tokens": []}
    assert tokenizer.encode(text) == Inner.from_str(json.dumps(plain)).encode(text).ids
    assert len(tokenizer.encode(text)) < 20


@pytest.mark.parametrize(
    "text", ["a\0b", "\u202eabc\u202c", "e" + "\u0301" * 1_000_000, " " * 300_000, "x" * 300_000, "a " * 200_000],
    ids=["nul", "rtl", "marks", "spaces", "letters", "words"],
)
def test_odd_text_is_linear_and_comes_back(text: str) -> None:
    began = time.monotonic()
    ids = BYTES.encode(text)
    assert time.monotonic() - began < 10
    assert BYTES.decode(ids) == text


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(DataError, match="lone surrogate: character 1"):
        BYTES.encode("a\ud800")


def test_training_is_deterministic_across_processes(tmp_path: Path) -> None:
    (tmp_path / "texts.json").write_text(json.dumps(sample_texts()))
    code = (
        "import json,sys; from sextant.data.tokenizer import Tokenizer;"
        "print(Tokenizer.train(json.load(open(sys.argv[1])), 300).digest)"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "texts.json"], capture_output=True, text=True)
    assert run.stdout.strip() == BYTES.digest


def test_trained_vocabulary() -> None:
    assert BYTES.vocab_size == 300
    assert [BYTES.token(i) for i in sorted(BYTES.special_ids)] == list(SPECIAL)
    assert BYTES.eot_id == 0
    assert BYTES.token_bytes_P[: len(SPECIAL)].tolist() == [0, 0, 0]
    assert BYTES.token_bytes_P.dtype == np.int64 and BYTES.token_bytes_P[3:].min() == 1
    assert Tokenizer.train(["tiny"], 4096).vocab_size < 300  # little text, few merges
    with pytest.raises(DataError, match=f"got 200, expected at least {MIN_VOCAB}"):
        Tokenizer.train(["x"], 200)


def test_vocabularies_that_the_library_would_die_of_are_refused() -> None:
    with pytest.raises(DataError, match=r"vocabulary too large \(got 2,000,000,000 ids, expected at most 16,777,216\)"):
        Tokenizer.train(["x"], 2_000_000_000)
    text = Inner(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a")).to_str()
    with pytest.raises(DataError, match=r"vocabulary too large: tokenizer\.json"):
        Tokenizer(text.replace('"</s>":1', f'"</s>":{2**31}'))


def test_batches_equal_single_texts() -> None:
    made = [*sample_texts(40), "", "long " * 40_000]
    for text, ids in zip(made, BYTES.encode_batch(made), strict=True):
        assert ids.tolist() == BYTES.encode(text)


def test_pieces_change_no_ids() -> None:
    rng = random.Random(2)
    parts = ["word", " ", "  ", "\n", "\t ", "'s", " 42", "日本", " !?", "\u0301"]
    text = "".join(rng.choice(parts) for _ in range(90_000))
    assert len(list(pieces(text))) > 2 and "".join(pieces(text)) == text
    assert BYTES.encode(text) == BYTES._inner.encode(text).ids


odd_parts = st.sampled_from([" ", "\n", "\t", "a", "1", "!", "'s", "\u0301", " a", " b"])


@given(st.lists(odd_parts, min_size=60, max_size=99))
def test_pieces_end_where_pretokens_end(parts: list[str]) -> None:
    text = " word".join(["".join(parts), "".join(reversed(parts))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "_PIECE", 90)
        cut = list(pieces(text))
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    if all(piece.startswith(" ") for piece in cut[1:]):
        assert [word for piece in cut for word, _ in split(piece)] == [word for word, _ in split(text)]
    assert "".join(cut) == text


def test_files_round_trip(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(BYTES.to_json())
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = Tokenizer.load(path)
        assert (again.digest, again.eot_id) == (BYTES.digest, BYTES.eot_id)
        assert again.to_json() == BYTES.to_json()
    spaced = json.dumps(json.loads(BYTES.to_json()), indent=2)
    assert Tokenizer(spaced).digest == BYTES.digest  # layout of the file is no difference
    other = json.loads(BYTES.to_json())
    merges = other["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]
    assert Tokenizer(json.dumps(other)).digest != BYTES.digest  # same size, other merges


def test_padding_and_truncation_of_a_file_are_switched_off() -> None:
    inner = Inner.from_str(BYTES.to_json())
    inner.enable_truncation(4)
    inner.enable_padding(length=9)
    assert Tokenizer(inner.to_str()).encode("sail the wind and the mast") == BYTES.encode("sail the wind and the mast")


def test_end_of_text_is_found_or_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(BYTES.to_json())
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    assert Tokenizer.load(tmp_path).eot == "<|im_end|>"
    config.write_text(json.dumps({"eos_token": "<nope>"}))
    with pytest.raises(DataError, match="end-of-text token is not in the vocabulary"):
        Tokenizer.load(tmp_path)
    for content, message in (("{", "cannot read"), ('{"eos_token": ["</s>"]}', "eos_token is no text")):
        config.write_text(content)
        with pytest.raises(DataError, match=message):
            Tokenizer.load(tmp_path)
    inner = Inner(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(DataError, match="has no end-of-text token"):
        Tokenizer(inner.to_str())


def test_a_panic_of_the_library_is_no_crash() -> None:
    state = json.loads(BYTES.to_json())
    state["model"]["continuing_subword_prefix"] = "longer than any token"
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        Tokenizer(json.dumps(state))


def test_a_text_that_the_library_cannot_encode_is_no_crash() -> None:
    inner = Inner(models.WordLevel({"a": 0, "</s>": 1}, unk_token="[UNK]"))
    with pytest.raises(DataError, match=r"cannot encode this text: tokenizer\.json .got WordLevel error: Missing"):
        Tokenizer(inner.to_str()).encode("b")


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    for content in (b"", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "BPE"}}'):
        (tmp_path / "t.json").write_bytes(content)
        with pytest.raises(DataError, match=r"not a tokenizer\.json") as caught:
            Tokenizer.load(tmp_path / "t.json")
        assert "\n" not in caught.value.line()
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        Tokenizer.load(tmp_path / "none.json")
    with pytest.raises(DataError, match="no such token"):
        BYTES.decode([BYTES.vocab_size])


@given(st.lists(st.sampled_from(["sail", "the", "wind", "日本", "é", "🧭", " "]), max_size=12).map(" ".join))
def test_vocabularies_that_are_not_byte_level(text: str) -> None:
    tokenizer = FALLBACK
    ids = tokenizer.encode(text)
    one_shot = tokenizer._inner.decode(ids, skip_special_tokens=False)
    assert tokenizer.decode(ids) == one_shot
    stream = StreamDecoder(tokenizer)
    assert "".join([*(stream.feed([i]) for i in ids), stream.finish()]) == one_shot
    # Each token's bytes are those inside a text: here with the space that the start of a text drops.
    assert tokenizer.token_bytes_P[ids].sum() == len((" " + one_shot).encode() if ids else b"")


FALLBACK = byte_fallback()
