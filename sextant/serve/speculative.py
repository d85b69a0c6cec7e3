"""Speculative decoding with the model's own prediction module: one draft per step, judged by the step that follows.

A draft is kept with probability ``min(1, p / q)`` and replaced by a draw from ``max(0, p - q)`` otherwise: tokens are
distributed as without drafts (2211.17192); greedy decoding is the case where ``p`` and ``q`` have one token each. The
model takes two tokens a step and the second back where it was refused; the module is fed true tokens only, so it has
nothing to take back. Spec deepseek-v3, 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from sextant.core.errors import UsageError
from sextant.core.state import Memory
from sextant.core.stream import Stream
from sextant.model.transformer import Transformer
from sextant.serve.sampling import Sampling, draw, transformed, uniform


@dataclass
class Answer:
    """New tokens of one prompt; ``kept`` of ``drafts`` were right."""

    tokens: list[int] = field(default_factory=list)
    drafts: int = 0
    kept: int = 0


@torch.inference_mode()
def speculate(
    model: Transformer, prompts: Sequence[list[int]], new: int, sampling: Sampling | None = None
) -> list[Answer]:
    """``new`` tokens after each prompt, none empty, without text or stop rules.

    Args:
        prompts: at least one.
        sampling: for all of them, greedy by default; a ``seed`` of None is 0. Prompts draw apart from one another.

    Raises:
        UsageError: the model has no prediction module.
    """
    if not len(model.mtp):
        raise UsageError("the model has no module to draft with", where="model.mtp", fix="Use decode_tokens")
    batch = _Speculation(model, prompts, sampling or Sampling(temperature=0))
    answers = list(batch.answers)
    while batch.keep_unfinished(new):
        batch.advance()
    for answer in answers:
        del answer.tokens[new:]  # the last step may have given one more
    return answers


class _Purpose(IntEnum):
    """What a random number is for."""

    TOKEN = 0
    DRAFT = 1
    JUDGEMENT = 2


class _Speculation:
    """Sequences that are decoded together, each as fast as its drafts are right.

    Attributes:
        rows: rows of the model that the module has not seen, by sequence.
        following: the token after each of them.
    """

    def __init__(self, model: Transformer, prompts: Sequence[list[int]], sampling: Sampling):
        self.model, self.sampling = model, sampling
        self.memory, self.drafts = model.memory(len(prompts), undo=1), model.draft_memory(len(prompts))
        self.numbers, self.answers = list(range(len(prompts))), [Answer() for _ in prompts]
        p_B1P, self.rows = self._read(prompts, 1)
        first = draw(p_B1P[:, 0].log(), self._uniforms(_Purpose.TOKEN))
        self.following = [[*prompt[1:], token] for prompt, token in zip(prompts, first, strict=True)]
        for answer, token in zip(self.answers, first, strict=True):
            answer.tokens.append(token)

    def keep_unfinished(self, new: int) -> bool:
        """Go on with the sequences that have fewer than ``new`` tokens; whether there are any."""
        stay = [b for b, answer in enumerate(self.answers) if len(answer.tokens) < new]
        if 0 < len(stay) < len(self.answers):
            self.memory.keep(stay)
            self.drafts.keep(stay)
            for name in ("numbers", "answers", "rows", "following"):
                setattr(self, name, [getattr(self, name)[b] for b in stay])
        return bool(stay)

    def advance(self) -> None:
        """A draft for every sequence, and the model's word on it: two tokens more, or one."""
        drafts, q_BP = self._propose()
        pairs = [[answer.tokens[-1], draft] for answer, draft in zip(self.answers, drafts, strict=True)]
        p_B2P, rows = self._read(pairs, 2)
        kept = self._judge(drafts, p_B2P[:, 0], q_BP)
        kept_B1 = torch.tensor(kept, device=q_BP.device)[:, None]
        weights_BP = torch.where(kept_B1, p_B2P[:, 1], (p_B2P[:, 0] - q_BP).clamp_min(0))
        last = draw(weights_BP.log(), self._uniforms(_Purpose.TOKEN))
        self.memory.rollback([0 if keep else 1 for keep in kept])
        self.rows = [own_TD[: 1 + keep] for own_TD, keep in zip(rows, kept, strict=True)]
        self.following = [[d, t] if keep else [t] for d, t, keep in zip(drafts, last, kept, strict=True)]
        for answer, tokens, keep in zip(self.answers, self.following, kept, strict=True):
            answer.tokens += tokens
            answer.drafts, answer.kept = answer.drafts + 1, answer.kept + keep

    def _propose(self) -> tuple[list[int], Tensor]:
        """The module's draft for each sequence, and the distributions ``[B, P]`` that they are from."""
        tokens_T, stream = self._stream(self.following, self.drafts)
        out = self.model.draft(torch.cat(self.rows), tokens_T, stream)
        q_BP = self._probs(out.hidden_TD[stream.cu_seqlens[1:].long() - 1])
        return draw(q_BP.log(), self._uniforms(_Purpose.DRAFT)), q_BP

    def _judge(self, drafts: list[int], p_BP: Tensor, q_BP: Tensor) -> list[bool]:
        drafts_B1 = torch.tensor(drafts, device=p_BP.device)[:, None]
        p, q = (probs_BP.gather(1, drafts_B1)[:, 0].tolist() for probs_BP in (p_BP, q_BP))
        return [u * own_q < own_p for u, own_p, own_q in zip(self._uniforms(_Purpose.JUDGEMENT), p, q, strict=True)]

    def _read(self, tokens: Sequence[list[int]], last: int) -> tuple[Tensor, list[Tensor]]:
        """Feed the model: the distributions ``[B, last, P]`` after the last tokens, and the rows, by sequence."""
        tokens_T, stream = self._stream(tokens, self.memory)
        out = self.model(tokens_T, stream)
        at_B = stream.cu_seqlens[1:].long()[:, None] - torch.arange(last, 0, -1, device=tokens_T.device)
        probs = self._probs(out.hidden_TD[at_B.flatten()]).unflatten(0, (-1, last))
        return probs, list(out.onward_TD.split(stream.lengths))

    def _stream(self, tokens: Sequence[list[int]], memory: Memory) -> tuple[Tensor, Stream]:
        device = self.model.embedding.weight.device
        tokens_T = torch.tensor(list(chain.from_iterable(tokens)), dtype=torch.int64, device=device)
        return tokens_T, Stream.of_lengths([len(own) for own in tokens], device, memory)

    def _probs(self, hidden_TD: Tensor) -> Tensor:
        """fp64 distributions ``[T, P]`` that tokens are drawn from; all on the likeliest token when greedy."""
        logits_TP = self.model.logits(hidden_TD)
        if self.sampling.greedy:
            return F.one_hot(logits_TP.argmax(-1), logits_TP.shape[-1]).double()
        return transformed(logits_TP, [self.sampling] * len(logits_TP)).double().softmax(-1)

    def _uniforms(self, purpose: _Purpose) -> list[float]:
        """One number for each sequence, which neighbours and their drafts do not change."""
        seed = self.sampling.seed or 0
        pairs = zip(self.numbers, self.answers, strict=True)
        return [uniform(seed, len(_Purpose) * b + purpose, len(answer.tokens)) for b, answer in pairs]
