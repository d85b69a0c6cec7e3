"""Looking inside: what selecting layers read, how well that covers full attention, and where gradient arrives.

Works for every pattern that leaves a :class:`Selection`. The teacher is full attention over the queries and keys that
the KV option made, before anything that a pattern does to keys itself, such as MoBA's key-conv. Spec sparse-attention
1.5 (U), section 2 (L9 load, L16 participation), 12.3 (recall).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sextant.axes.attention import Selection
from sextant.axes.attention.base import sequences
from sextant.axes.kv.base import Heads
from sextant.core.stream import Stream
from sextant.kernels.attention import Scores
from sextant.kernels.loss import IGNORE, summed_loss
from sextant.model.block import SelfAttention
from sextant.model.transformer import Output, Transformer

SINK_ALARM = 4.0
"""Block 0 chosen more often than this many times the mean block is worth a warning (spec section 2, L9)."""

CHUNK = 256
"""Queries whose full attention exists at once."""


@dataclass(frozen=True)
class Seen:
    """One selecting layer in one forward: what it was given and what it chose.

    Attributes:
        groups: key heads that a decoding step reads apart.
    """

    layer: int
    kind: str
    groups: int
    heads: Heads
    stream: Stream
    scores: Scores
    selection: Selection

    def chosen(self) -> Tensor:
        """bool ``[T, H, M]``: which blocks each query reads; H as the choice was made."""
        blocks_THJ = self.selection.blocks_THJ
        count = -(-self.stream.max_len // self.selection.block)
        chosen_THM = blocks_THJ.new_zeros(*blocks_THJ.shape[:2], count + 1, dtype=torch.bool)
        return chosen_THM.scatter_(2, blocks_THJ.where(blocks_THJ >= 0, count), True)[..., :count]

    @property
    def current_T(self) -> Tensor:
        """Block that each query lies in, which is also how many complete blocks lie before it."""
        return self.stream.positions_T // self.selection.block

    def chosen_past(self) -> Tensor:
        """:meth:`chosen` without each query's own block."""
        chosen_THM = self.chosen()
        before_TM = torch.arange(chosen_THM.shape[2], device=chosen_THM.device) < self.current_T[:, None]
        return chosen_THM & before_TM[:, None]


@dataclass(frozen=True)
class Choice:
    """What one layer's choices amount to.

    Attributes:
        queries: those that could not read all of their past, which the means below are taken over.
        read: past blocks that a query head reads.
        union: distinct past blocks that the heads of one key head read: what a decoding step loads (U).
        union_by_chance: the same if heads chose apart and evenly.
        mass: share of full attention's weight that lies in what was read.
        recall: that share over the share of the best equally many blocks.
        load_M: share of all choices of past blocks that fell on each block.
        chance_M: the same if every past block were as likely: early blocks can be chosen by more queries.
        map_CM: row of query blocks, column of key blocks: share of the heads' queries that read it, own blocks too.
    """

    layer: int
    kind: str
    block: int
    queries: int
    read: float
    union: float
    union_by_chance: float
    mass: float
    recall: float
    load_M: list[float]
    chance_M: list[float]
    map_CM: list[list[float]]

    @property
    def peak(self) -> float:
        """Busiest block over the mean."""
        return max(self.load_M) * len(self.load_M)

    @property
    def sink(self) -> float:
        """Block 0 over the mean."""
        return self.load_M[0] * len(self.load_M)

    @property
    def sink_by_chance(self) -> float:
        """:attr:`sink` if every past block were as likely."""
        return self.chance_M[0] * len(self.chance_M)

    @property
    def gini(self) -> float:
        """Of the load: 0 is even, 1 is all on one block."""
        return gini(self.load_M)

    @property
    def alarm(self) -> bool:
        """Block 0 draws too much."""
        return self.sink > SINK_ALARM


def gini(shares: Sequence[float]) -> float:
    """Gini coefficient of non-negative numbers."""
    ordered, total = sorted(shares), sum(shares)
    if not total:
        return 0.0
    ranks = sum((2 * i - len(ordered) + 1) * value for i, value in enumerate(ordered))
    return ranks / (len(ordered) * total)


@contextmanager
def watched(model: Transformer) -> Iterator[list[Seen]]:
    """Collect what selecting layers do in the forwards that run inside."""
    found: list[Seen] = []
    hooks = []
    for index, block in enumerate(model.blocks):
        attention: nn.Module = block.attention  # type: ignore[assignment]
        if isinstance(attention, SelfAttention):
            layer = model.spec.layers[index]

            def note(
                _module: nn.Module, given: tuple[Any, ...], result: tuple[Tensor, Selection | None], index: int = index,
                kind: str = layer.attention.kind, groups: int = layer.projections.row().heads,
            ) -> None:
                heads, _, stream, scores, _ = given
                if result[1] is not None:
                    found.append(Seen(index, kind, groups, heads, stream, scores, result[1]))

            hooks.append(attention.pattern.register_forward_hook(note))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def look(model: Transformer, tokens_T: Tensor, stream: Stream) -> tuple[list[Choice], Output]:
    """Run a stream of whole sequences and judge every selecting layer."""
    with watched(model) as found:
        out = model(tokens_T, stream)
    return [judge(seen) for seen in found], out


@torch.no_grad()
def judge(seen: Seen) -> Choice:
    """Union, load and recall of one layer's choices."""
    past_THM, current_T = seen.chosen_past(), seen.current_T
    counts_TH = past_THM.sum(2).double()
    choosing_T = counts_TH.amax(1) < current_T
    counts, many = counts_TH[choosing_T], current_T[choosing_T, None].double()
    members = max(1, past_THM.shape[1] // seen.groups)
    by_chance = many * (1 - (1 - counts / many) ** members)
    mass, best = recalled(seen, choosing_T) if choosing_T.any() else (math.nan, math.nan)
    load_M = past_THM.sum((0, 1)).double()[: max(1, int(current_T.max()))]  # the last block is nobody's past
    return Choice(
        seen.layer, seen.kind, seen.selection.block, int(choosing_T.sum()), _mean(counts),
        _mean(distinct(past_THM, seen.groups)[choosing_T].double()), _mean(by_chance), mass,
        mass / best, _shares(load_M), _shares(_even_load(counts_TH, current_T, len(load_M))),
        _map(seen.chosen(), current_T).tolist(),
    )


def distinct(chosen_THM: Tensor, groups: int) -> Tensor:
    """int64 ``[T, G]``: different blocks that the heads of each of G key heads read (the U of spec 1.5)."""
    tokens, heads, count = chosen_THM.shape
    if heads < groups:
        chosen_THM = chosen_THM.expand(tokens, groups, count)
    return chosen_THM.unflatten(1, (groups, -1)).any(2).sum(-1)


def recalled(seen: Seen, asked_T: Tensor) -> tuple[float, float]:
    """Full attention's weight in the chosen blocks, and in the best as many, meaned over heads and the asked queries.

    The best choice reads the query's own block too, where the judged one does.
    """
    chosen_THM, (got, best, at), total = seen.chosen(), (0.0, 0.0, 0), int(asked_T.sum())
    for own in sequences(seen.heads, seen.stream, None):
        length, heads = len(own.q_THK), own.q_THK.shape[1]
        for start in range(0, length, CHUNK):
            here = slice(start, min(length, start + CHUNK))
            rows = slice(at + here.start, at + here.stop)
            mass_THM = block_mass(own.q_THK[here], own.k_SGK[: here.stop], seen.scores.scale, seen.selection.block)
            here_THM = chosen_THM[rows, :, : mass_THM.shape[2]]
            here_THM = here_THM.repeat_interleave(heads // here_THM.shape[1], dim=1)
            asked_T1 = asked_T[rows, None]
            got += float(((mass_THM * here_THM).sum(2) * asked_T1).sum()) / heads / total
            best += float((_best_mass(mass_THM, here_THM, seen.current_T[rows]) * asked_T1).sum()) / heads / total
        at += length
    return got, best


def block_mass(q_THK: Tensor, k_SGK: Tensor, scale: float, block: int) -> Tensor:
    """fp32 ``[T, H, M]``: full attention's weight by block, for the last T queries of S tokens."""
    tokens, keys = len(q_THK), len(k_SGK)
    k_SHK = k_SGK.float().repeat_interleave(q_THK.shape[1] // k_SGK.shape[1], dim=1)
    scores_THS = torch.einsum("thk,shk->ths", q_THK.float(), k_SHK) * scale
    key_S = torch.arange(keys, device=q_THK.device)
    hidden_TS = key_S > key_S[keys - tokens :, None]
    weights_THS = scores_THS.masked_fill(hidden_TS[:, None], -math.inf).softmax(-1)
    padded = nn.functional.pad(weights_THS, (0, -keys % block))
    return padded.unflatten(2, (-1, block)).sum(-1)


def _best_mass(mass_THM: Tensor, chosen_THM: Tensor, current_T: Tensor) -> Tensor:
    """``[T, H]``: weight in the own block, if chosen, and in the heaviest as many others."""
    own_TH1 = current_T[:, None, None].expand(-1, mass_THM.shape[1], 1)
    reads_own_TH = chosen_THM.gather(2, own_TH1)[..., 0]
    own_TH = mass_THM.gather(2, own_TH1)[..., 0] * reads_own_TH
    others_THM = mass_THM.scatter(2, own_TH1, 0.0).sort(dim=2, descending=True).values
    place_M = torch.arange(mass_THM.shape[2], device=mass_THM.device)
    many_TH = chosen_THM.sum(2) - reads_own_TH.long()
    return own_TH + (others_THM * (place_M < many_TH[..., None])).sum(2)


def _even_load(counts_TH: Tensor, current_T: Tensor, blocks: int) -> Tensor:
    """Choices by block if each query spread as many over all of its past."""
    share_T = counts_TH.sum(1) / current_T.clamp(min=1)
    return share_T @ (torch.arange(blocks, device=current_T.device) < current_T[:, None]).double()


def _map(chosen_THM: Tensor, current_T: Tensor) -> Tensor:
    """``[C, M]``: of the queries in block c, the share that reads block m."""
    count = chosen_THM.shape[2]
    sums = torch.zeros(count, count, dtype=torch.float64, device=current_T.device)
    sums.index_add_(0, current_T, chosen_THM.double().mean(1))
    return sums / torch.bincount(current_T, minlength=count).clamp(min=1)[:, None]


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else math.nan


def _shares(counts_M: Tensor) -> list[float]:
    return (counts_M / counts_M.sum().clamp(min=1)).tolist()


def participation(model: Transformer, tokens_T: Tensor, targets_T: Tensor, stream: Stream) -> list[float]:
    """How evenly the loss's gradient is spread over the prompt, at the input of every layer, meaned over sequences.

    ``(sum g)^2 / (T sum g^2)`` with g the gradient's norm at each of T positions that carry no loss of their own (all,
    if none is without): 1 is even, 1/T is one position. Where few targets count, sparse layers thin it out towards the
    top (spec section 2, L16).
    """
    inputs: list[Tensor] = []

    def keep(_module: nn.Module, given: tuple[Any, ...]) -> None:
        inputs.append(given[0].requires_grad_())

    hooks = [block.register_forward_pre_hook(keep) for block in model.blocks]
    try:
        with torch.enable_grad():
            hidden_TD = model(tokens_T, stream).hidden_TD
            loss = summed_loss(hidden_TD, model.head_PD, targets_T, softcap=model.spec.softcap)
            gradients = torch.autograd.grad(loss, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    prompts = [(part == IGNORE) | (part != IGNORE).all() for part in targets_T.split(stream.lengths)]
    return [_evenness(gradient_TD.double().norm(dim=1), prompts) for gradient_TD in gradients]


def _evenness(norm_T: Tensor, prompts: list[Tensor]) -> float:
    """Mean over the sequences whose prompt gets any gradient; not a number if none does."""
    parts = zip(norm_T.split([len(prompt) for prompt in prompts]), prompts, strict=True)
    reached = [g_T for norm, prompt in parts if (g_T := norm[prompt]).any()]
    ratios = [float(g_T.sum() ** 2 / (len(g_T) * g_T.square().sum())) for g_T in reached]
    return sum(ratios) / len(ratios) if ratios else math.nan
