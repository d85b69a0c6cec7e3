"""Rows of zeros to expect when every token chooses its experts evenly at random: for budgets, before anything runs.

An expert's share is then binomial, ``B(T, A / E)``; shares of different experts are taken as independent. A router that
prefers some experts fills blocks as well and needs larger shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def block_padding(tokens: int, chosen: int, experts: int, block: int) -> float:
    """Zeros that fill every share up to a multiple of ``block``; at most ``experts * (block - 1)``."""
    return experts * _mean(tokens, chosen / experts, lambda rows: -rows % block)


def longest_padding(tokens: int, chosen: int, experts: int, most: float = math.inf) -> float:
    """Zeros that fill every share up to the longest, of which no share keeps more than ``most`` rows."""
    rows, chance = _shares(tokens, chosen / experts)
    kept = rows.clamp(max=most)
    longest = float(kept[-1] - ((kept.diff()) * chance.cumsum(0)[:-1] ** experts).sum())
    return experts * (longest - float((kept * chance).sum()))


def _mean(tokens: int, share: float, of: Callable[[Tensor], Tensor]) -> float:
    rows, chance = _shares(tokens, share)
    return float((of(rows) * chance).sum())


@cache
def _shares(tokens: int, share: float) -> tuple[Tensor, Tensor]:
    """fp64: numbers of rows within ten deviations of the mean, and the chance of each."""
    mean, reach = tokens * share, 10 * math.sqrt(tokens * share * (1 - share)) + 10
    rows = torch.arange(max(0, int(mean - reach)), min(tokens, int(mean + reach)) + 1, dtype=torch.float64)
    drawn = torch.distributions.Binomial(tokens, torch.tensor(share, dtype=torch.float64), validate_args=False)
    return rows, drawn.log_prob(rows).exp()
