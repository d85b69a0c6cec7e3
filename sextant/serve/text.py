"""Text of one answer as its tokens arrive: whole characters only, and never a part of a stop string."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Literal

from sextant.data.tokenizer import StreamDecoder, Tokenizer
from sextant.serve.sampling import Sampling, uniform

FinishReason = Literal["stop", "length", "eot"]

_CARRY = 4
"""Prompt tokens that the decoder sees first: a character may begin in them, a space may depend on them."""


class StopFilter:
    """Passes text on, up to the stop string that ends first (the longest of those that end together).

    What could be the start of a stop string is held back until the text after it decides.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops = stops
        self.found = False
        self._held = ""

    def feed(self, text: str) -> str:
        """The part of all text so far that is certain by now and was not given out before."""
        if self.found or not text:
            return ""
        self._held += text
        ends = [(at + len(stop), at) for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            return self._release(min(ends)[1])
        return self._release(len(self._held) - self._doubtful())

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        return "" if self.found else self._release(len(self._held))

    def _release(self, upto: int) -> str:
        text, self._held = self._held[:upto], self._held[upto:]
        return text

    def _doubtful(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max(map(len, self.stops), default=0)
        for length in range(min(longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self.stops):
                return length
        return 0


class Answer:
    """One sequence while it is written.

    Attributes:
        tokens: every id so far, an end-of-text and the tokens of a stop string included.
        finish_reason: None while it goes on.
        seed: what its draws are keyed by; a fresh one when the sampling names none.
    """

    def __init__(self, prompt: Sequence[int], sampling: Sampling, tokenizer: Tokenizer, room: int, choice: int = 0):
        self.sampling, self.choice = sampling, choice
        self.seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._limit, self._eot = min(sampling.max_tokens, room), tokenizer.eot_id
        self._decoder, self._stops = StreamDecoder(tokenizer, special=False), StopFilter(sampling.stop)
        self._decoder.feed(prompt[-_CARRY:])

    def uniform(self) -> float:
        """The number that the next token is drawn with."""
        return 0.0 if self.sampling.greedy else uniform(self.seed, self.choice, len(self.tokens))

    def take(self, token: int) -> str:
        """Add a token; returns the text that is certain by now."""
        self.tokens.append(token)
        if token == self._eot:
            return self._end("eot")
        text = self._stops.feed(self._decoder.feed([token]))
        if self._stops.found:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self._limit:
            return text + self._end("length")
        return text

    def _end(self, reason: FinishReason) -> str:
        text = self._stops.feed(self._decoder.finish()) + self._stops.flush()
        self.finish_reason = "stop" if self._stops.found else reason
        return text
