"""From logits to tokens: what a caller may ask for, the transforms in their order, and repeatable draws.

Order: fp32 logits, temperature, min-p, top-k, top-p, draw. The number that a draw uses is a hash of (seed, choice,
position), so that batch neighbours, recomputation and the device change nothing about it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b

import torch
from pydantic import Field, field_validator
from torch import Tensor

from sextant.core.errors import NumericsError
from sextant.core.spec import Spec

GREEDY_BELOW = 1e-5
"""Temperatures below this take the largest logit."""

MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256


class Sampling(Spec):
    """How one answer is drawn.

    Attributes:
        temperature: divides logits; 0 takes the largest logit, ties to the lower id.
        top_k: only the k likeliest tokens, ties to the lower id; 0 is off.
        top_p: the fewest likeliest tokens that together reach this probability; 1 is off.
        min_p: only tokens at least this fraction as likely as the likeliest; 0 is off.
        max_tokens: new tokens at most; the model's context may end sooner.
        seed: makes the draws repeatable; None takes a fresh one.
        stop: the text ends before the first of these strings.
    """

    temperature: float = Field(default=1.0, ge=0, le=2)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    max_tokens: int = Field(default=200, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: tuple[str, ...] = ()

    @field_validator("stop")
    @classmethod
    def _few_and_short(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if len(stop) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} stop strings, not {len(stop)}")
        for text in stop:
            if not text:
                raise ValueError("a stop string is empty")
            if len(text) > MAX_STOP_CHARACTERS:
                raise ValueError(f"a stop string has {len(text)} characters, more than {MAX_STOP_CHARACTERS}")
        return stop

    @property
    def greedy(self) -> bool:
        """No draw at all."""
        return self.temperature < GREEDY_BELOW

    @property
    def ranks(self) -> bool:
        """Some filter needs the tokens in order of likelihood."""
        return self.top_k > 0 or self.top_p < 1


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) for one draw: the top 53 bits of a hash of its three coordinates.

    Args:
        seed: of the request.
        choice: number of the answer, when a request asks for several.
        position: number of the token within its answer.
    """
    name = b"".join(number.to_bytes(8, "little", signed=True) for number in (seed, choice, position))
    return (int.from_bytes(blake2b(name, digest_size=8).digest(), "little") >> 11) / 2**53


def choose(logits_BP: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> list[int]:
    """One token for each row.

    Args:
        logits_BP: as the model gives them.
        samplings: what each row asks for.
        uniforms: the number in [0, 1) that each row draws with; greedy rows ignore theirs.

    Raises:
        NumericsError: a row without a finite largest logit.
    """
    peaks = logits_BP.amax(-1).tolist()
    if not all(map(math.isfinite, peaks)):
        raise NumericsError("logits are not finite", got=peaks, fix="Check the weights, or use --dtype fp32")
    tokens = _best(logits_BP)
    drawn = [b for b, sampling in enumerate(samplings) if not sampling.greedy]
    if drawn:
        rows_BP = logits_BP if len(drawn) == len(tokens) else logits_BP[drawn]
        log_weights_BP = transformed(rows_BP, [samplings[b] for b in drawn])
        for b, token in zip(drawn, draw(log_weights_BP, [uniforms[b] for b in drawn]), strict=True):
            tokens[b] = token
    return tokens


def _best(logits_BP: Tensor) -> list[int]:
    """The first largest of each row; numpy's search takes a tenth of torch's on a CPU."""
    return (logits_BP.numpy() if logits_BP.device.type == "cpu" else logits_BP).argmax(-1).tolist()


def transformed(logits_BP: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """fp32 logits after temperature and filters, largest 0 in each row, minus infinity where a filter refused."""
    temperature_B = _column([sampling.temperature for sampling in samplings], logits_BP)
    scaled_BP = logits_BP.to(torch.promote_types(logits_BP.dtype, torch.float32)) / temperature_B
    scaled_BP -= scaled_BP.amax(-1, keepdim=True)
    if any(sampling.min_p for sampling in samplings):
        floor_B = _column([sampling.min_p for sampling in samplings], scaled_BP).log()
        scaled_BP = scaled_BP.masked_fill(scaled_BP < floor_B, -math.inf)
    ranked = [b for b, sampling in enumerate(samplings) if sampling.ranks]
    if ranked:
        scaled_BP[ranked] = _likeliest(scaled_BP[ranked], [samplings[b] for b in ranked])
    return scaled_BP


def _likeliest(scaled_BP: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Top-k, then top-p over what top-k left."""
    vocab = scaled_BP.shape[1]
    k_B = _column([sampling.top_k or vocab for sampling in samplings], scaled_BP)
    p_B = _column([sampling.top_p if sampling.top_p < 1 else math.inf for sampling in samplings], scaled_BP)
    longest = min(vocab, max(sampling.top_k or vocab for sampling in samplings))
    # [B, longest] from here: how many stay depends on ordered values alone, because tied tokens weigh the same.
    ordered = scaled_BP.topk(longest).values
    within_k = torch.arange(longest, device=k_B.device) < k_B
    probs = ordered.masked_fill(~within_k, -math.inf).softmax(-1)
    mass_before = probs.cumsum(-1, dtype=torch.float64) - probs
    count_B = (within_k & (mass_before < p_B)).sum(-1, keepdim=True)
    return _largest(scaled_BP, ordered.gather(1, count_B - 1), count_B)


def _largest(scaled_BP: Tensor, least_B: Tensor, count_B: Tensor) -> Tensor:
    """Keep ``count_B`` values of each row, the smallest of which is ``least_B``; of its ties the lower ids."""
    above_BP, tied_BP = scaled_BP > least_B, scaled_BP == least_B
    ties_B = count_B - above_BP.sum(-1, keepdim=True)
    kept_BP = above_BP | (tied_BP & (tied_BP.cumsum(-1) <= ties_B))
    return scaled_BP.masked_fill(~kept_BP, -math.inf)


def draw(log_weights_BP: Tensor, uniforms: Sequence[float]) -> list[int]:
    """The token at which the cumulative weight, in order of ids, passes the uniform's share of the total."""
    cumulative_BP = log_weights_BP.double().exp().cumsum(-1)
    share_B = torch.tensor(uniforms, dtype=torch.float64, device=log_weights_BP.device)[:, None]
    return torch.searchsorted(cumulative_BP, share_B * cumulative_BP[:, -1:], right=True)[:, 0].tolist()


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]
