"""Stop strings against a naive oracle at every chunking; text of tokens that cut characters."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sextant.data.tokenizer import Tokenizer
from sextant.serve.sampling import Sampling
from sextant.serve.text import Answer, StopFilter


def oracle(text: str, stops: list[str]) -> tuple[str, bool]:
    """Read on until some stop string ends here; of those that do, the longest counts."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(
    text=st.text("abA ", max_size=60), stops=st.lists(st.text("abA ", min_size=1, max_size=6), max_size=4),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=600, deadline=None)
def test_stop_filter_equals_the_oracle_at_every_chunking(text: str, stops: list[str], seed: int):
    expected, found = oracle(text, stops)
    chunks = random.Random(seed)
    stop_filter, given_out, at = StopFilter(stops), "", 0
    while at < len(text):
        size = chunks.randint(1, 5)
        given_out += stop_filter.feed(text[at : at + size])
        at += size
        assert expected.startswith(given_out)  # nothing of a stop string leaks
    assert given_out + stop_filter.flush() == expected
    assert stop_filter.found == found


def test_text_is_held_back_no_longer_than_needed():
    stop_filter = StopFilter(["</end>"])
    assert stop_filter.feed("a </en") == "a "
    assert stop_filter.feed("x") == "</enx"
    assert stop_filter.feed("<<") == "<"
    assert stop_filter.feed("/end> more") == ""
    assert stop_filter.found and stop_filter.flush() == ""


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token for each byte: every character beyond ASCII is cut."""
    of_byte = {tokenizer.bytes_of(i): i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids}
    return [of_byte[bytes([byte])] for byte in text.encode()]


def written(answer: Answer, ids: list[int]) -> list[str]:
    pieces = []
    for token in ids:
        pieces.append(answer.take(token))
        if answer.finish_reason is not None:
            break
    return pieces


@pytest.mark.parametrize("cut", [True, False])
@given(text=st.text(st.sampled_from("the cat é猫🙂\n"), min_size=1, max_size=40), data=st.data())
@settings(max_examples=150, deadline=None)
def test_answers_never_cut_characters_or_leak_stops(cut: bool, text: str, data: st.DataObject):
    tokenizer = small_tokenizer()
    ids = byte_ids(tokenizer, text) if cut else tokenizer.encode(text)
    stops = data.draw(st.lists(st.text("the cat é猫🙂\n", min_size=1, max_size=3), max_size=3))
    answer = Answer([5], Sampling(max_tokens=1000, stop=tuple(stops)), tokenizer, 1000)
    pieces = written(answer, [*ids, tokenizer.eot_id])
    expected, found = oracle(text, stops)
    assert "".join(pieces) == expected
    assert not any("\ufffd" in piece for piece in pieces)
    assert answer.finish_reason == ("stop" if found else "eot")


def small_tokenizer() -> Tokenizer:
    if not _KEPT:
        _KEPT.append(Tokenizer.train(["the cat sat; café 猫 🙂 " * 30], 290))
    return _KEPT[0]


_KEPT: list[Tokenizer] = []


def test_length_inside_a_character_ends_with_one_replacement():
    tokenizer = small_tokenizer()
    ids = byte_ids(tokenizer, "a猫")
    answer = Answer([5], Sampling(max_tokens=3), tokenizer, 1000)
    assert written(answer, ids) == ["a", "", "\ufffd"]
    assert answer.finish_reason == "length" and answer.tokens == ids[:3]


def test_a_character_begun_in_the_prompt_is_completed():
    tokenizer = small_tokenizer()
    *begun, last = byte_ids(tokenizer, "x猫")
    answer = Answer(begun, Sampling(max_tokens=1), tokenizer, 1000)
    assert answer.take(last) == "猫"


def test_room_limits_below_max_tokens_and_control_tokens_have_no_text():
    tokenizer = small_tokenizer()
    other = next(i for i in sorted(tokenizer.special_ids) if i != tokenizer.eot_id)
    answer = Answer([5], Sampling(max_tokens=50), tokenizer, 2)
    assert answer.take(other) == "" and answer.finish_reason is None
    answer.take(tokenizer.encode("t")[0])
    assert answer.finish_reason == "length"
