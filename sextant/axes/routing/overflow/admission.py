"""Who gets a place when places are few: the order of copies, and the copies that come in time.

Copies of one bin (an expert, or a device's experts, of one group of tokens) take its places in a stated order; those
that find none are dropped, and their token passes by the residual.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from sextant.axes.routing.base import Routing

Order = Literal["choice", "position", "score", "affinity", "random"]
"""``choice``: all first choices before all second ones, each by position (GShard 2006.16668, Algorithm 1; Switch).
``position``: token by token, all choices of a token together; later tokens cannot take a place from earlier ones.
``score``: as ``choice``, but tokens with a larger best probability come first (V-MoE's batch priority, 2106.05974).
``affinity``: copy by copy, larger probabilities first (DeepSeek-V2, Megatron's ``probs``).
``random``: as ``choice``, but tokens in random order (DeepSpeed's random token selection), by torch's generator."""


def ranked(routing: Routing, order: Order) -> Tensor:
    """int64 ``[N]``: the numbers of the copies, first served first; without those that the router itself dropped."""
    tokens, copies = routing.experts_TA.shape
    if order == "position":
        order_N = torch.arange(tokens * copies, device=routing.experts_TA.device)
    elif order == "affinity":
        order_N = affinity(routing).flatten().argsort(descending=True, stable=True)
    else:
        order_T = TOKENS[order](routing)
        order_N = (order_T * copies + torch.arange(copies, device=order_T.device)[:, None]).flatten()
    return order_N if routing.kept_TA is None else order_N[routing.kept_TA.flatten()[order_N]]


def affinity(routing: Routing) -> Tensor:
    """``[T, A]``: probabilities of the chosen experts, outside the graph."""
    return routing.probs_TE.detach().gather(1, routing.experts_TA)


TOKENS: dict[str, Callable[[Routing], Tensor]] = {
    "choice": lambda routing: torch.arange(len(routing.experts_TA), device=routing.experts_TA.device),
    "score": lambda routing: affinity(routing).amax(1).argsort(descending=True, stable=True),
    "random": lambda routing: torch.randperm(len(routing.experts_TA), device=routing.experts_TA.device),
}
"""The order of tokens in those rules that serve all first choices first."""


def places(bins_N: Tensor, order_N: Tensor) -> Tensor:
    """int64 ``[N]``: how many copies of the same bin are served before each copy; for one not in ``order_N``, more than
    any bin holds.
    """
    sorted_N, by_N = bins_N[order_N].sort(stable=True)
    first_N = torch.searchsorted(sorted_N, sorted_N)
    place_N = torch.full_like(bins_N, torch.iinfo(torch.int64).max)
    place_N[order_N[by_N]] = torch.arange(len(order_N), device=order_N.device) - first_N
    return place_N


def admitted(routing: Routing, bins_TA: Tensor, limit: int | Tensor, order_N: Tensor) -> Routing:
    """The routing in which each bin keeps its first ``limit`` copies (a number, or one per copy)."""
    place_TA = places(bins_TA.flatten(), order_N).view_as(bins_TA)
    return replace(routing, kept_TA=place_TA < limit)


def share(factor: float, tokens: Tensor, copies: int, experts: int, minimum: int) -> Tensor:
    """int64: ``C = ceil(factor * tokens * A / E)``, at least ``minimum``: places of each expert for so many tokens."""
    exact = tokens.double() * copies * factor / experts
    return (exact * (1 - 1e-12)).ceil().long().clamp_min(minimum)  # E/A in binary may lie above E/A
