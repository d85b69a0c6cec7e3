"""A task that only far keys can solve: a phone book of pairs, and questions about them at the end.

A row is ``pairs`` adjacent (name, number) tokens in random order and places with filler between them, a gap of filler,
and then every name again in another order, each to be followed by its number. Only the answers are scored. A small
model that reads everything learns it in a few hundred steps; one that cannot reach the pairs, or cannot hold so many,
does not (spec sparse-attention T20).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sextant.core.stream import Stream
from sextant.model.transformer import Transformer


@dataclass(frozen=True)
class PhoneBook:
    """The task. Token 0 is filler, then come ``names`` names and as many numbers.

    Attributes:
        pairs: pairs in the book, and questions.
        book: tokens that the book is spread over, even.
        gap: filler between book and questions, so that no chain of windows reaches over it.
        names: how many names there are to draw from.
        scored: questions that carry loss, the last ones; None for all.
        shift: what is added to a number in its answer, modulo ``names``: a habit to be learnt anew.
    """

    pairs: int = 16
    book: int = 32
    gap: int = 96
    names: int = 32
    scored: int | None = None
    shift: int = 0

    @property
    def vocab(self) -> int:
        return 1 + 2 * self.names

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.book + self.gap + 2 * self.pairs

    def batch(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """int64 ``[B, T]`` tokens, and targets that are -100 except where a number has to be told."""
        tokens_BT = torch.zeros(rows, self.length, dtype=torch.long)
        targets_BT = torch.full((rows, self.length), -100)
        names = _drawn(rows, self.names, self.pairs, generator)
        numbers = torch.randint(self.names, (rows, self.pairs), generator=generator)
        places = 2 * _drawn(rows, self.book // 2, self.pairs, generator)
        tokens_BT.scatter_(1, places, 1 + names)
        tokens_BT.scatter_(1, places + 1, 1 + self.names + numbers)
        asked = _drawn(rows, self.pairs, self.pairs, generator)
        at, answers = self.length - 2 * self.pairs, (numbers.gather(1, asked) + self.shift) % self.names
        tokens_BT[:, at::2], tokens_BT[:, at + 1 :: 2] = 1 + names.gather(1, asked), 1 + self.names + answers
        unscored = self.pairs - (self.pairs if self.scored is None else self.scored)
        targets_BT[:, at + 2 * unscored :: 2] = (1 + self.names + answers)[:, unscored:]
        return tokens_BT, targets_BT


def _drawn(rows: int, among: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` different numbers below ``among`` in random order, for each row."""
    return torch.rand(rows, among, generator=generator).argsort(1)[:, :count]


PASSED = 0.9
"""Share of right answers at which a lesson is over."""

Point = tuple[int, float, float]
"""Step, loss, and share of right answers."""


def learn(
    model: Transformer,
    lessons: Sequence[PhoneBook],
    steps: int,
    seed: int,
    *,
    rows: int = 64,
    rate: float = 3e-3,
    say: Callable[[str], None] = lambda line: None,
    every: int = 20,
    enough: float = math.inf,
) -> list[Point]:
    """Train for so many steps, on one lesson after another: the next begins when the last ``every`` steps were nearly
    all right, so that easy rows teach the way to hard ones. Ends early when the last lesson's share of right answers
    passes ``enough``. The same seed gives the same rows as long as lessons agree.

    Returns:
        The curve: points of the last lesson say how well it is solved; before it is reached, the share is 0.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    lesson, recent, curve = 0, [], []
    for step in range(1, steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(20 * step / steps, 1.0) * (1 - 0.9 * step / steps)
        loss, right = score(model.train(), lessons[lesson], rows, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        recent = [*recent, right][-every:]
        mean = sum(recent) / len(recent)
        last, whole = lesson == len(lessons) - 1, len(recent) == every
        done = step == steps or (last and whole and mean > enough)
        if step % every == 0 or done:
            curve.append((step, loss.item(), mean if last else 0.0))
            say(f"{model.spec.name} seed {seed} step {step} lesson {lesson} loss {loss.item():.3f} right {mean:.2f}")
        if done:
            break
        if not last and whole and mean > PASSED:
            lesson, recent = lesson + 1, []
    return curve


def score(model: Transformer, task: PhoneBook, rows: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """Mean loss of the answers of fresh rows, and the share that is right."""
    device = model.embedding.weight.device
    tokens_BT, targets_BT = (x.to(device) for x in task.batch(rows, generator))
    stream = Stream.of_lengths([task.length] * rows, device)
    hidden_TD = model(tokens_BT.flatten(), stream).hidden_TD
    asked_T = targets_BT.flatten() >= 0
    logits_NP, targets_N = model.logits(hidden_TD[asked_T]), targets_BT.flatten()[asked_T]
    right = (logits_NP.argmax(-1) == targets_N).float().mean().item()
    return F.cross_entropy(logits_NP, targets_N), right
