"""MoA's search (2406.14909; spec sparse-attention 9): which span does every KV head of a trained dense model need?

Profile: how much the loss would rise, to first order, if a query could not read a key. Plan: one rule, ``alpha + beta
N``, for each KV head of each layer, such that the keys read stay within a budget at several lengths and the profiled
rise is least. Choose: the plan that does best at a length that no plan was made for. HiGHS solves the integer program
where scipy is installed; a greedy search stands in elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product

import torch
from torch import Tensor

from sextant.axes.attention import MoA
from sextant.axes.attention.moa import Elastic
from sextant.axes.attention.static import StaticAttention
from sextant.axes.kv.base import Heads
from sextant.core.errors import UsageError
from sextant.core.state import Keys
from sextant.core.stream import Stream
from sextant.kernels.attention import Scores, Span, attend_with_lse
from sextant.kernels.loss import summed_loss
from sextant.model.spec import ModelSpec
from sextant.model.transformer import Transformer


def influence(weights_HTS: Tensor, gradient_HTS: Tensor) -> Tensor:
    """Rise of the loss if one key were masked and its row's weights made to sum to 1 again: ``[H, T, S]``.

    ``E_ij = A_ij (sum_n g_in A_in - g_ij) / (1 - A_ij)``, which is ``g . (row without j - row)``. A key that is all
    its row reads cannot be left out: its value is lost, ``-g A``.

    Args:
        weights_HTS: attention A, rows sum to 1.
        gradient_HTS: g, of the loss with respect to A.
    """
    mean_HT1 = (weights_HTS * gradient_HTS).sum(-1, keepdim=True)
    rest_HTS = 1 - weights_HTS
    alone_HTS = rest_HTS <= torch.finfo(rest_HTS.dtype).eps
    moved_HTS = weights_HTS * (mean_HT1 - gradient_HTS) / rest_HTS.masked_fill(alone_HTS, 1.0)
    return torch.where(alone_HTS, -weights_HTS * gradient_HTS, moved_HTS)


@dataclass(frozen=True)
class Profile:
    """What reading costs and spares at one length.

    Attributes:
        length: tokens of the profiled sequences.
        rise_LGS: rise of the loss in nats per sequence if a KV head's queries could not read the key ``S`` tokens
            back, sinks excepted; by layer, KV head and distance.
    """

    length: int
    rise_LGS: Tensor

    def loss(self, span: Span) -> Tensor:
        """Rise of the loss ``[L, G]`` if every head had this span."""
        window = self.length if span.window is None else span.window
        return self.rise_LGS[..., window:].sum(-1)


def profile(model: Transformer, tokens_NT: Tensor, targets_NT: Tensor, sinks: int) -> Profile:
    """Measure a dense model on sequences of one length.

    Args:
        tokens_NT, targets_NT: int64, a sequence in each row; a target of -100 carries no loss.

    Raises:
        UsageError: a layer of the model is not full attention.
    """
    seen: list[tuple[Heads, Scores, Tensor]] = []
    hooks = [_watch(block, layer, seen) for layer, block in enumerate(model.blocks)]
    total: Tensor | None = None
    try:
        for tokens_T, targets_T in zip(tokens_NT, targets_NT, strict=True):
            seen.clear()
            out = model(tokens_T, Stream.of_lengths([len(tokens_T)]))
            loss = summed_loss(out.hidden_TD, model.head_PD, targets_T, model.spec.softcap)
            grads = torch.autograd.grad(loss, [o_THV for *_, o_THV in seen])
            layers = [_by_distance(*made[:2], grad, sinks) for made, grad in zip(seen, grads, strict=True)]
            total = torch.stack(layers) if total is None else total + torch.stack(layers)
    finally:
        for hook in hooks:
            hook.remove()
    if total is None:
        raise UsageError("nothing to profile", got="no sequences", expected="at least one")
    return Profile(tokens_NT.shape[1], total / len(tokens_NT))


def _watch(
    block: torch.nn.Module, layer: int, seen: list[tuple[Heads, Scores, Tensor]]
) -> torch.utils.hooks.RemovableHandle:
    """Note what attention is made of, and its output, each time it runs."""
    pattern = dict(block.named_modules()).get("attention.pattern")
    if type(pattern) is not StaticAttention or set(pattern.reaches) != {Span()}:
        fix = "Profile the dense model, then give it the plan"
        raise UsageError("spans are searched for full attention", where=f"layers[{layer}].attention", fix=fix)

    def note(module: torch.nn.Module, inputs: tuple, output: tuple[Tensor, None]) -> None:
        heads, _, _, scores, _ = inputs
        seen.append((heads, scores, output[0]))

    return pattern.register_forward_hook(note)


@torch.no_grad()
def _by_distance(heads: Heads, scores: Scores, gradient_THV: Tensor, sinks: int) -> Tensor:
    """Influence ``[G, S]`` of the keys so many tokens back, summed over queries and the heads of a group."""
    tokens, groups = len(heads.k_TGK), heads.k_TGK.shape[1]
    stream, keys = Stream.of_lengths([tokens], heads.k_TGK.device), Keys(heads.k_TGK, heads.v_TGV)
    place_T = torch.arange(tokens, device=heads.k_TGK.device)
    distance_TS = place_T[:, None] - place_T
    _, lse_HT = attend_with_lse(heads.q_THK, keys, stream, Span(), scores)
    logits_HTS = _logits(heads, scores, distance_TS)
    weights_HTS = (logits_HTS - lse_HT[..., None]).exp().masked_fill(distance_TS < 0, 0.0)
    v_SHV = heads.v_TGV.repeat_interleave(heads.q_THK.shape[1] // groups, dim=1)
    gradient_HTS = torch.einsum("thv,shv->hts", gradient_THV, v_SHV)
    rise_HTS = influence(weights_HTS.double(), gradient_HTS.double())
    rise_GTS = rise_HTS.unflatten(0, (groups, -1)).sum(1)
    rise_GTS = rise_GTS.masked_fill((distance_TS < 0) | (place_T < sinks), 0.0)
    by_GS = rise_GTS.new_zeros(groups, tokens)
    return by_GS.index_add(1, distance_TS.clamp(min=0).flatten(), rise_GTS.flatten(1))


def _logits(heads: Heads, scores: Scores, distance_TS: Tensor) -> Tensor:
    k_SHK = heads.k_TGK.repeat_interleave(heads.q_THK.shape[1] // heads.k_TGK.shape[1], dim=1)
    logits_HTS = torch.einsum("thk,shk->hts", heads.q_THK, k_SHK) * scores.scale
    if scores.slopes_H is None:
        return logits_HTS
    return logits_HTS - scores.slopes_H[:, None, None] * distance_TS


@dataclass(frozen=True)
class Rules:
    """The spans that a head may have: every ``alpha`` with every ``beta``, cut to whole blocks."""

    alphas: Sequence[int]
    betas: Sequence[float]
    sinks: int
    block: int

    @property
    def pairs(self) -> list[tuple[int, float]]:
        return list(product(self.alphas, self.betas))

    def spans(self, length: int) -> list[Span]:
        """The span of each rule at this length."""
        last = torch.tensor(length - 1)
        elastic = [Elastic(alpha, beta, self.sinks, self.block) for alpha, beta in self.pairs]
        return [Span(int(reach.window(last)), self.sinks) for reach in elastic]


@dataclass(frozen=True)
class Problem:
    """Choose one rule for every head.

    Attributes:
        losses: float64 ``[heads, rules]``, rise of the loss if a head (of all layers, in a row) takes a rule.
        shares: float64 ``[lengths, rules]``, keys that a rule reads as a share of full attention's.
        bounds: the largest mean share allowed at each length.
    """

    losses: Tensor
    shares: Tensor
    bounds: Sequence[float]


def search(
    profiles: Sequence[Profile], check: Profile, rules: Rules, density: Mapping[int, float] | float = 0.5
) -> list[MoA]:
    """One pattern for each layer, within the budget at every profiled length.

    Plans are made for each length's loss alone and for all together; the best at the length of ``check`` is taken.

    Args:
        density: keys read, as a share of full attention's, at most: one number, or one for each length.

    Raises:
        UsageError: not even the shortest rule fits.
    """
    spans = [rules.spans(each.length) for each in profiles]
    shares = torch.stack([_shares(mine, each.length) for mine, each in zip(spans, profiles, strict=True)])
    bounds = [density if isinstance(density, float | int) else density[each.length] for each in profiles]
    tables = [_losses(each, mine) for each, mine in zip(profiles, spans, strict=True)]
    scaled = [table / table.abs().max().clamp(min=1e-30) for table in tables]
    objectives = [*scaled, torch.stack(scaled).sum(0)] if len(scaled) > 1 else scaled
    plans = [solve(Problem(losses, shares, bounds)) for losses in objectives]
    judged = _losses(check, rules.spans(check.length))
    best = min(plans, key=lambda plan: float(judged[range(len(plan)), plan].sum()))
    return _patterns(best, check.rise_LGS.shape[1], rules)


def _shares(spans: Sequence[Span], length: int) -> Tensor:
    full = Span().mean_keys(length)
    return torch.tensor([span.mean_keys(length) / full for span in spans], dtype=torch.float64)


def _losses(measured: Profile, spans: Sequence[Span]) -> Tensor:
    return torch.stack([measured.loss(span).flatten() for span in spans], dim=-1).double()


def _patterns(plan: Sequence[int], groups: int, rules: Rules) -> list[MoA]:
    pairs = [rules.pairs[rule] for rule in plan]
    layers = [pairs[at : at + groups] for at in range(0, len(pairs), groups)]
    return [
        MoA(alpha=tuple(a for a, _ in layer), beta=tuple(b for _, b in layer), sinks=rules.sinks, block=rules.block)
        for layer in layers
    ]


def with_spans(model: ModelSpec, plan: Sequence[MoA], length: int | None = None) -> ModelSpec:
    """The model with the plan in place of full attention; ``length`` fixes the spans at that of one input length."""
    layers = tuple(
        layer.replace(attention=pattern.replace(length=length))
        for layer, pattern in zip(model.layers, plan, strict=True)
    )
    return model.replace(layers=layers)


def solve(problem: Problem) -> list[int]:
    """A rule for each head, by integer programming where scipy is installed, else greedily.

    Raises:
        UsageError: no plan fits the bounds.
    """
    least_by_length = problem.shares.min(-1).values
    if (least_by_length > torch.tensor(problem.bounds, dtype=torch.float64) + 1e-12).any():
        least = ", ".join(f"{share:.3f}" for share in least_by_length.tolist())
        raise UsageError("no plan fits the density", got=list(problem.bounds), expected=f"at least {least}")
    return by_program(problem) if find_spec("scipy") else greedily(problem)


def by_program(problem: Problem) -> list[int]:
    """The best plan: binary variables ``x[N, A]``, one rule a head, mean shares within the bounds (HiGHS)."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import eye, kron

    heads, rules = problem.losses.shape
    one = LinearConstraint(kron(eye(heads), np.ones((1, rules))), 1, 1)
    rows = np.tile(problem.shares.numpy() / heads, heads)
    within = [LinearConstraint(row, -np.inf, bound) for row, bound in zip(rows, problem.bounds, strict=True)]
    found = milp(
        problem.losses.flatten().numpy(), constraints=[one, *within], integrality=1, bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise UsageError("no plan found", got=found.message)
    return found.x.reshape(heads, rules).argmax(1).tolist()


def greedily(problem: Problem) -> list[int]:
    """A good plan: from the best rules on, the head that loses least per share given up takes a shorter rule."""
    plan, heads = problem.losses.argmin(-1), torch.arange(len(problem.losses))
    bounds = torch.tensor(problem.bounds, dtype=torch.float64)
    while True:
        over = problem.shares[:, plan].mean(-1) > bounds + 1e-12
        if not over.any():
            return plan.tolist()
        saved = problem.shares[:, plan][..., None] - problem.shares[:, None]  # [lengths, heads, rules]
        gain = saved[over].sum(0)
        lost = problem.losses - problem.losses[heads, plan][:, None]
        shorter = (gain > 1e-12) & (saved >= -1e-12).all(0)  # at no length longer, so that this comes to an end
        price = torch.where(shorter, lost / gain.clamp(min=1e-12), torch.inf)
        head, rule = divmod(int(price.argmin()), price.shape[1])
        plan[head] = rule
