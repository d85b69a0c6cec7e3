"""What every row of axis 1 promises about what it reads, in one layer and to the last bit.

Ids are those of docs/contracts.md. The rows that come in are drawn, or made hard on purpose; the layer is the one of a
built model, so projections and position codes take part.
"""

from __future__ import annotations

import copy
import random

import pytest
import torch
from cases import DENSE, PLAIN, VOCAB, allowed, built, chunked, close, combinations, params, run
from torch import Tensor, nn

from sextant.axes.attention import DSA, InfLLMV2, MoBA
from sextant.axes.attention.base import Selection
from sextant.axes.attention.static import StaticPattern
from sextant.axes.kv import NoPE
from sextant.core.spec import Spec
from sextant.core.state import BlockState, JointState, LayerState
from sextant.core.stream import Stream

EVERY = [(attention, kv) for attention, kv in combinations() if kv in (PLAIN, None)]
ROWS = params(EVERY)
WIDTH, T = 10, 23


def drawn(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(attention: Spec, kv: Spec | None) -> nn.Module:
    """The attention of a model's only layer."""
    return built(attention, kv, layers=1).blocks[0].attention  # type: ignore[arg-type, return-value]


def attended(module: nn.Module, x_TD: Tensor, lengths: list[int] | None = None) -> tuple[Tensor, Selection | None]:
    return module(x_TD, Stream.of_lengths(lengths or [len(x_TD)]))


def same_choice(one: Selection | None, two: Selection | None, tokens: int = T) -> bool:
    """Of the first tokens, by set: places at the end may be empty."""
    if one is None or two is None:
        return one is two
    sets = [[[set(row) - {-1} for row in heads] for heads in s.blocks_THJ[:tokens].tolist()] for s in (one, two)]
    return sets[0] == sets[1]


@pytest.mark.parametrize(("attention", "kv"), ROWS)
@torch.no_grad()
def test_t3_later_rows_change_not_one_bit(attention, kv):
    """Every later row five times as large: outputs and choices up to t are the same bits, and the rest are not."""
    module, x_TD = layer(attention, kv), drawn(T)
    before, choice = attended(module, x_TD)
    for t in (0, 3, 8, 13):
        after, again = attended(module, torch.cat([x_TD[: t + 1], 5 * x_TD[t + 1 :]]))
        assert torch.equal(after[: t + 1], before[: t + 1])
        assert same_choice(choice, again, t + 1)
        assert (after[t + 1 :] != before[t + 1 :]).any(-1).all()


@pytest.mark.parametrize(("attention", "kv"), ROWS)
@torch.no_grad()
def test_t4_a_prefix_ends_in_the_same_row(attention, kv):
    module, x_TD = layer(attention, kv), drawn(T)
    whole_TD = attended(module, x_TD)[0]
    for t in (1, 2, 4, 5, 12, 22):
        close(attended(module, x_TD[:t])[0][-1], whole_TD[t - 1], 1e-12)


@pytest.mark.parametrize(("attention", "kv"), ROWS)
def test_t5_chunks_of_any_size(attention, kv):
    """Sizes drawn anew, down to single tokens; T is no multiple of a block. No token comes twice: without a position
    code its two keys would tie, and which of them wins would be the rounding of a product, not a rule.
    """
    model, tokens_T, sizes = built(attention, kv, DENSE), torch.randperm(VOCAB)[:T], random.Random(5)
    whole_TP = run(model, tokens_T, [T])
    for most in (2, 6, 14):
        close(chunked(model, tokens_T, [sizes.randint(1, most) for _ in range(T)]), whole_TP, 1e-12)


@pytest.mark.parametrize(("attention", "kv"), ROWS)
def test_t6_packed_lengths_around_a_block(attention, kv):
    """Outputs and the gradient of what comes in, packed against one by one."""
    block = min(getattr(attention, "block", None) or getattr(attention, "chunk", 4), 7)
    lengths = [1, max(1, block - 1), block, block + 1, 3 * block + 7]
    module, x_TD = layer(attention, kv), drawn(sum(lengths)).requires_grad_()
    packed_TD = attended(module, x_TD, lengths)[0]
    separate_TD = torch.cat([attended(module, part)[0] for part in x_TD.split(lengths)])
    close(packed_TD, separate_TD, 1e-12)
    weight_TD = drawn(len(x_TD), seed=1)
    close(*(torch.autograd.grad(y_TD, x_TD, weight_TD)[0] for y_TD in (packed_TD, separate_TD)), 1e-11)


def read_and_taught(attention: Spec, kv: Spec | None, x_TD: Tensor) -> tuple[Selection, Tensor]:
    """What the last token chose, and which value rows its output teaches: bool ``[G, S]``."""
    module, seen = layer(attention, kv), {}
    hook = module.pattern.register_forward_hook(lambda _, args, out: seen.update(v=args[0].v_TGV, out=out))
    attended(module, x_TD.requires_grad_())
    hook.remove()
    o_THV, selection = seen["out"]
    (dv_SGV,) = torch.autograd.grad(o_THV[-1].square().sum(), seen["v"])
    return selection, (dv_SGV != 0).any(-1).t()


def reads_its_choice(attention: Spec) -> bool:
    """And nothing else, in training too. DSA's dense stage reads everything and only learns to choose."""
    return isinstance(attention, MoBA | InfLLMV2) or (isinstance(attention, DSA) and attention.stage == "sparse")


@pytest.mark.parametrize(("attention", "kv"), params(pair for pair in EVERY if reads_its_choice(pair[0])))
def test_t10_exactly_the_chosen_values_have_a_gradient(attention, kv):
    """Of the rows that read what they choose and nothing else; NSA's other branches have tests of their own."""
    selection, taught_GS = read_and_taught(attention, kv, drawn(T))
    chosen_HJ = selection.blocks_THJ[-1]
    chosen_GJ = chosen_HJ.expand(max(2, len(chosen_HJ)), -1).unflatten(0, (2, -1)).flatten(1)
    for taught_S, blocks_J in zip(taught_GS, chosen_GJ, strict=True):
        assert torch.equal(taught_S, torch.isin(torch.arange(T) // selection.block, blocks_J))


@torch.no_grad()
def chooses(attention: Spec, kv: Spec | None) -> bool:
    return attended(layer(attention, kv), drawn(T))[1] is not None


@pytest.mark.parametrize(("attention", "kv"), params(pair for pair in EVERY if chooses(*pair)))
@torch.no_grad()
def test_t11_choices_are_past_blocks_once_each(attention, kv):
    """The own block counts, a later one never; no number stands twice."""
    selection = attended(layer(attention, kv), drawn(T))[1]
    assert selection is not None
    for t, heads in enumerate(selection.blocks_THJ.tolist()):
        for row in heads:
            chosen = [block for block in row if block != -1]
            assert len(set(chosen)) == len(chosen)
            assert all(0 <= block <= t // selection.block for block in chosen)


def summaries(state: LayerState) -> list[BlockState]:
    """The parts of a state that hold one row per finished block."""
    if isinstance(state, JointState):
        return [found for part in state.parts.values() for found in summaries(part)]
    return [state] if isinstance(state, BlockState) else []


def keeps_summaries(attention: Spec, kv: Spec | None) -> bool:
    """And finishes one within the test."""
    return getattr(attention, "block", T) < T and bool(summaries(built(attention, kv, DENSE, 1).memory(1).layers[0]))  # type: ignore[arg-type]


@pytest.mark.parametrize(("attention", "kv"), params(pair for pair in EVERY if keeps_summaries(*pair)))
def test_t11_a_finished_summary_never_changes(attention, kv):
    """Whatever comes after it, one token or many, the rows of finished blocks stay the same bits."""
    model = built(attention, kv, DENSE, 1)
    memory, tokens_T = model.memory(1), torch.randperm(VOCAB)
    run(model, tokens_T[:12], [12], memory)
    before = [state.buffer[0, : state.held[0]].clone() for state in summaries(memory.layers[0])]
    assert all(len(rows) for rows in before)
    for tokens in (1, 4, 6):
        run(model, tokens_T[-tokens:], [tokens], memory)
    for state, rows in zip(summaries(memory.layers[0]), before, strict=True):
        assert state.held[0] > len(rows)
        assert torch.equal(state.buffer[0, : len(rows)], rows)


def swaps_groups(attention: Spec, kv: Spec | None) -> bool:
    """Whether the two KV groups read alike and the pattern holds no weights of either."""
    if kv is None or any(True for _ in layer(attention, kv).pattern.parameters()):
        return False
    reaches = attention.reaches(kv) if isinstance(attention, StaticPattern) else ()
    return len(set(reaches)) <= 1


@pytest.mark.parametrize(("attention", "kv"), params(pair for pair in EVERY if swaps_groups(*pair)))
@torch.no_grad()
def test_t14_swapped_groups_give_swapped_heads(attention, kv):
    """Exact but for the order of sums: the output product is undone by swapping its columns with the heads."""
    module, x_TD = copy.deepcopy(layer(attention, kv)), drawn(T)
    before_TD = attended(module, x_TD)[0]
    for linear in (module.kv.q, module.kv.k, module.kv.v):
        linear.weight.copy_(linear.weight.unflatten(0, (2, -1)).flip(0).flatten(0, 1))
    assert (attended(module, x_TD)[0] - before_TD).abs().max() > 1e-2
    module.kv.o.weight.copy_(module.kv.o.weight.unflatten(1, (2, -1)).flip(1).flatten(1, 2))
    close(attended(module, x_TD)[0], before_TD, 1e-12)


def hard(case: str) -> Tensor:
    """Rows that make all keys alike, all of them huge, or the first one a sink that outweighs the rest."""
    x_TD = drawn(T)
    if case == "constant":
        return x_TD[:1].expand(T, -1).clone()
    x_TD[: T if case == "huge" else 1] *= 1e4
    return x_TD


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["constant", "huge", "sink"])
@pytest.mark.parametrize(("attention", "kv"), ROWS)
def test_t24_hard_rows_stay_finite_and_repeat(attention, kv, case, dtype):
    """Outputs, choices and gradients, twice the same bits. Without a position code constant keys tie exactly."""
    plain = kv and kv.replace(position=NoPE())
    module = copy.deepcopy(layer(attention, plain if allowed(attention, plain) else kv)).to(dtype)
    runs = []
    for _ in range(2):
        x_TD = hard(case).to(dtype).requires_grad_()
        y_TD, choice = attended(module, x_TD)
        runs.append((y_TD, choice, *torch.autograd.grad(y_TD.sum(), x_TD)))
    (y_TD, choice, dx_TD), (again_TD, same, d_again_TD) = runs
    assert y_TD.isfinite().all() and dx_TD.isfinite().all()
    assert torch.equal(y_TD, again_TD) and torch.equal(dx_TD, d_again_TD)
    assert same_choice(choice, same)
