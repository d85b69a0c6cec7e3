"""MoBA, property by property; ids as in the test catalogue of spec sparse-attention 15 and the account in 2."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import DENSE, MOE, PLAIN, built, chunked, close, model_spec, random_tokens, run
from torch import Tensor

from sextant.axes.attention import Full, MoBA, Selection
from sextant.axes.attention.base import sequences
from sextant.axes.kv import GQA, MLA, ALiBi, NoPE, RoPE
from sextant.axes.kv.base import Heads
from sextant.axes.numerics import FP32
from sextant.core.cost import At
from sextant.core.errors import UsageError
from sextant.core.state import BlockState, Memory
from sextant.core.stream import Stream
from sextant.kernels.attention import Scores, attend_dense
from sextant.kernels.attention.topk import block_means, choose, top_blocks
from sextant.lab.selection import distinct
from sextant.model.checks import check
from sextant.model.spec import Layer

BLOCK, T = 4, 27
LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7]
SPARSE = MoBA(block=BLOCK, top_k=2)
EVERY = MoBA(block=BLOCK, top_k=8)
VARIANTS = [
    SPARSE,
    SPARSE.replace(per="group"),
    SPARSE.replace(top_k=3, previous=1),
    SPARSE.replace(min_len=10),
    SPARSE.replace(top_k=3, previous=2, min_len=6, per="group"),
]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rows(tokens: int = T, heads: int = 4, groups: int = 2, seed: int = 0, dtype=torch.float64) -> list[Tensor]:
    """q, k and v of one step; values wider than keys."""
    return [drawn(tokens, n, w, seed=seed + i, dtype=dtype) for i, (n, w) in enumerate(
        ((heads, 8), (groups, 8), (groups, 10)))]


def attended(spec: MoBA, q: Tensor, k: Tensor, v: Tensor, lengths: list[int] | None = None) -> tuple[Tensor, Selection]:
    """One layer's attention without projections."""
    kv = GQA(heads=q.shape[1], kv_heads=k.shape[1], head_dim=q.shape[2])
    module = spec.build(16, kv, FP32())
    return module(Heads(q, k, v), q[:, 0], Stream.of_lengths(lengths or [len(q)]), Scores(0.4), None)


def full(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    position = torch.arange(len(q))
    causal = position[:, None] >= position
    return attend_dense(q, k, v, causal if mask is None else causal & mask, Scores(0.4))[0]


def slow_choice(spec: MoBA, q: Tensor, k: Tensor) -> list[list[set[int]]]:
    """Blocks of every query and head by the words of the paper, in loops."""
    heads, groups = q.shape[1], k.shape[1]
    members = heads // groups
    chosen = []
    for t in range(len(q)):
        current, of_heads = t // spec.block, []
        for h in range(heads):
            choosers = range(h // members * members, h // members * members + members) if spec.per == "group" else [h]
            score = {}
            for n in range(current):
                mean = k[n * spec.block : (n + 1) * spec.block, h // members].mean(0)
                score[n] = sum(float(q[t, c] @ mean) for c in choosers)
                if n >= current - spec.previous:
                    score[n] = math.inf
            best = sorted(score, key=lambda n: (-score[n], n))
            taken = best if t < spec.min_len else best[: spec.top_k - 1]
            of_heads.append({current, *taken})
        chosen.append(of_heads)
    return chosen


def as_mask(chosen: list[list[set[int]]], block: int) -> Tensor:
    """bool ``[H, T, S]``."""
    tokens = len(chosen)
    rows = [[[s // block in blocks for s in range(tokens)] for blocks in of_heads] for of_heads in chosen]
    return torch.tensor(rows).transpose(0, 1)


def as_sets(selection: Selection) -> list[list[set[int]]]:
    return [[set(blocks) - {-1} for blocks in heads] for heads in selection.blocks_THJ.tolist()]


# --- T1, T2, T9, T10: what is read, and its gradients ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("per", ["head", "group"])
def test_t1_all_blocks_are_full_attention(dtype, tolerance, per):
    q, k, v = rows(dtype=dtype)
    got = attended(EVERY.replace(per=per), q, k, v)[0]
    assert got.dtype == dtype
    close(got.double(), full(q.double(), k.double(), v.double()), tolerance)


def test_l12_short_sequences_are_read_in_full():
    """Up to ``top_k * block`` tokens nothing is left out."""
    spec, (q, k, v) = SPARSE.replace(top_k=3), rows(3 * BLOCK)
    close(attended(spec, q, k, v)[0], full(q, k, v))


@pytest.mark.parametrize("spec", VARIANTS, ids=str)
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 3), (6, 1)])
def test_t2_output_and_gradients_of_the_dense_masked_reference(spec, heads, groups):
    ours = [x.requires_grad_() for x in rows(heads=heads, groups=groups)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    o_THV, selection = attended(spec, *ours)
    chosen = slow_choice(spec, theirs[0].detach(), theirs[1].detach())
    want_THV = full(*theirs, mask=as_mask(chosen, BLOCK))
    close(o_THV, want_THV, 1e-10)
    weight = drawn(*o_THV.shape, seed=9)
    for got, want in zip(torch.autograd.grad((o_THV * weight).sum(), ours),
                         torch.autograd.grad((want_THV * weight).sum(), theirs), strict=True):
        close(got, want, 1e-10)
    assert not selection.blocks_THJ.requires_grad


@pytest.mark.parametrize("spec", VARIANTS, ids=str)
def test_choices_are_those_of_the_paper_in_loops(spec):
    q, k, v = rows()
    chosen, want = as_sets(attended(spec, q, k, v)[1]), slow_choice(spec, q, k)
    if spec.per == "group":
        want = [[heads[0], heads[2]] for heads in want]
    assert chosen == want


def test_t9_one_block_is_local_not_full():
    q, k, v = rows()
    position = torch.arange(T) // BLOCK
    o_THV = attended(SPARSE.replace(top_k=1), q, k, v)[0]
    close(o_THV, full(q, k, v, position[:, None] == position))
    assert (o_THV - full(q, k, v))[BLOCK:].abs().amax((1, 2)).min() > 1e-3


def test_t10_what_nobody_chose_has_no_gradient():
    q, k, v = (x.requires_grad_() for x in rows(heads=2, groups=2))
    o_THV, selection = attended(SPARSE, q, k, v)
    assert (o_THV - full(q, k, v)).abs().max() > 1e-2
    last = T - 1
    dk, dv = torch.autograd.grad(o_THV[last].square().sum(), [k, v])
    for h in range(2):
        read = {int(n) for n in selection.blocks_THJ[last, h]}
        for s in range(T):
            touched = s // BLOCK in read
            assert bool((dv[s, h] != 0).any()) == touched == bool((dk[s, h] != 0).any())


# --- T3, T4, T6, T14, T24: causality, packing, symmetry, hard inputs ------------------------------------------------


@pytest.mark.parametrize("spec", VARIANTS, ids=str)
def test_t3_later_tokens_change_no_bit(spec):
    q, k, v = rows()
    before, chosen = attended(spec, q, k, v)
    for t in (0, 3, 4, 11, 25):
        later = [torch.cat([x[: t + 1], 5 * drawn(*x[t + 1 :].shape, seed=40 + i)]) for i, x in enumerate((q, k, v))]
        after, again = attended(spec, *later)
        assert torch.equal(after[: t + 1], before[: t + 1])
        assert torch.equal(again.blocks_THJ[: t + 1], chosen.blocks_THJ[: t + 1])
        assert not torch.equal(after[t + 1 :], before[t + 1 :])


@pytest.mark.parametrize("spec", VARIANTS, ids=str)
def test_t4_a_prefix_gives_the_same_last_row(spec):
    q, k, v = rows()
    whole = attended(spec, q, k, v)[0]
    for t in (1, 4, 5, 12, 26):
        close(attended(spec, q[:t], k[:t], v[:t])[0][-1], whole[t - 1], 1e-12)


@pytest.mark.parametrize("spec", VARIANTS, ids=str)
def test_t6_packed_sequences_are_separate_ones(spec):
    q, k, v = rows(sum(LENGTHS))
    packed, selection = attended(spec, q, k, v, LENGTHS)
    at = 0
    for length in LENGTHS:
        here = slice(at, at + length)
        alone, chosen = attended(spec, q[here], k[here], v[here])
        close(packed[here], alone, 1e-12)
        assert as_sets(Selection(selection.blocks_THJ[here], BLOCK)) == as_sets(chosen)
        at += length


def test_streams_with_empty_sequences_and_none_at_all():
    q, k, v = rows(9)
    close(attended(SPARSE, q, k, v, [0, 5, 0, 4])[0], attended(SPARSE, q, k, v, [5, 4])[0])
    o_THV, selection = attended(SPARSE, q[:0], k[:0], v[:0], [0])
    assert o_THV.shape == (0, 4, 10) and len(selection.blocks_THJ) == 0


def test_t12_grouped_heads_choose_as_with_repeated_keys():
    q, k, v = rows()
    native, chosen = attended(SPARSE, q, k, v)
    repeated, again = attended(SPARSE, q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    assert torch.equal(native, repeated) and torch.equal(chosen.blocks_THJ, again.blocks_THJ)
    assert attended(SPARSE.replace(per="group"), q, k, v)[1].blocks_THJ.shape[1] == 2
    assert chosen.blocks_THJ.shape[1] == 4 and not torch.equal(chosen.blocks_THJ[:, 0], chosen.blocks_THJ[:, 1])


def test_t14_permuted_heads_give_permuted_outputs():
    q, k, v = rows(heads=3, groups=3)
    turn = torch.tensor([2, 0, 1])
    close(attended(SPARSE, q[:, turn], k[:, turn], v[:, turn])[0], attended(SPARSE, q, k, v)[0][:, turn])


def test_t14_batch_elements_are_independent():
    q, k, v = rows(2 * T)
    before = attended(SPARSE, q, k, v, [T, T])[0]
    q[T:], k[T:], v[T:] = (drawn(*x[T:].shape, seed=77) for x in (q, k, v))
    after = attended(SPARSE, q, k, v, [T, T])[0]
    assert torch.equal(after[:T], before[:T]) and not torch.equal(after[T:], before[T:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_t24_ties_huge_keys_and_a_sink_stay_finite_and_repeat(dtype):
    q, k, v = rows(dtype=dtype)
    sink = k.clone()
    sink[0] *= 1e4
    for keys in (torch.ones_like(k), 1e4 * k, sink):
        inputs = [x.clone().requires_grad_() for x in (q, keys, v)]
        o_THV, chosen = attended(SPARSE, *inputs)
        again, same = attended(SPARSE, *inputs)
        assert torch.equal(o_THV, again) and torch.equal(chosen.blocks_THJ, same.blocks_THJ)
        assert o_THV.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(o_THV.sum(), inputs))
    # Whole numbers, because a product may add up a column at the edge in another order, which breaks a tie.
    ties = attended(SPARSE, (4 * q).round(), torch.ones_like(k), v)[1].blocks_THJ
    assert (ties[BLOCK:, :, 1] == 0).all()  # the lower block wins


# --- T5, T11: decoding ----------------------------------------------------------------------------------------------


def stirred(attention: MoBA, kv: GQA = PLAIN, feed_forward=DENSE, layers: int = 2):
    """A model whose key-conv does something, which at its start it does not."""
    model = copy.deepcopy(built(attention, kv, feed_forward, layers))
    for name, parameter in model.named_parameters():
        if "taps" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(len(name)))
    return model


CONV = MoBA(block=3, top_k=2, key_conv=3)
DECODED = [*VARIANTS, CONV, CONV.replace(key_conv=5, previous=1, min_len=5), CONV.replace(key_conv=2, per="group")]


@pytest.mark.parametrize("spec", DECODED, ids=str)
def test_t5_any_chunks_give_the_rows_of_the_prompt(spec):
    model, tokens_T = stirred(spec), random_tokens(T)
    whole_TP, rng = run(model, tokens_T, [T]), random.Random(1)
    close(chunked(model, tokens_T, [1] * T), whole_TP)
    for _ in range(3):
        close(chunked(model, tokens_T, [rng.randrange(1, 9) for _ in range(T)]), whole_TP)


@pytest.mark.parametrize("spec", [CONV, CONV.replace(key_conv=5)], ids=str)
def test_key_conv_packs_rolls_back_and_forks(spec):
    """What the contract says of every pattern, with taps that are not zero."""
    model, tokens_T, wrong_T = stirred(spec, feed_forward=MOE), random_tokens(20), random_tokens(20, seed=5)
    whole_TP = run(model, tokens_T, [20])
    lengths = [1, 2, 9, 8]
    close(run(model, tokens_T, lengths), torch.cat([run(model, x, [len(x)]) for x in tokens_T.split(lengths)]))
    memory, pieces, at = model.memory(1, undo=4), [], 0
    for good, bad in ((5, 4), (1, 3), (6, 1), (2, 4), (6, 0)):
        pieces.append(run(model, tokens_T[at : at + good], [good], memory))
        at += good
        for token in wrong_T[:bad]:
            run(model, token[None], [1], memory)
        memory.rollback(bad)
    close(torch.cat(pieces), whole_TP)
    memory = model.memory(1)
    run(model, tokens_T[:11], [11], memory)
    other = memory.fork()
    run(model, wrong_T[:5], [5], memory)
    close(run(model, tokens_T[11:], [9], other), whole_TP[11:])


def test_dense_decoding_reads_everything_and_prompts_stay_sparse():
    """The named exemption: a step of one token is full attention over the same keys; chunks are MoBA (spec 3.3)."""
    dense, sparse = built(SPARSE.replace(decode="dense"), layers=1), built(SPARSE, layers=1)
    everything, tokens_T = built(Full(), layers=1), random_tokens(T)
    close(run(dense, tokens_T, [T]), run(sparse, tokens_T, [T]))
    close(chunked(dense, tokens_T, [5, 7, 9, 6]), run(sparse, tokens_T, [T]))
    stepped_TP = chunked(dense, tokens_T, [1] * T)
    close(stepped_TP, run(everything, tokens_T, [T]))
    assert (stepped_TP - run(sparse, tokens_T, [T]))[2 * BLOCK :].abs().max() > 1e-3


def test_t11_a_closed_block_never_changes_and_the_open_one_has_no_mean():
    model, tokens_T = built(SPARSE, layers=1), random_tokens(T)
    memory, seen = model.memory(1), []
    for token in tokens_T:
        run(model, token[None], [1], memory)
        means = memory.layers[0].part("means", BlockState)
        assert isinstance(means, BlockState) and means.held[0] == memory.lengths[0] // BLOCK
        now = means.buffer[0, : means.held[0]].clone()
        assert all(torch.equal(now[: len(old)], old) for old in seen)
        seen.append(now)


@pytest.mark.parametrize("tokens", [BLOCK - 1, 2 * BLOCK, 3 * BLOCK + 1])
def test_t11_only_complete_past_blocks_and_the_own_are_chosen(tokens):
    q, k, v = rows(tokens)
    blocks_THJ = attended(EVERY, q, k, v)[1].blocks_THJ
    current_T = torch.arange(tokens) // BLOCK
    assert torch.equal(blocks_THJ[..., 0], current_T[:, None].expand(-1, 4))
    assert (blocks_THJ[..., 1:] < current_T[:, None, None]).all()
    for t in range(tokens):
        assert sorted(set(blocks_THJ[t, 0].tolist()) - {-1}) == list(range(int(current_T[t]) + 1))


# --- negative tests of spec 1.4 and 3.1 -----------------------------------------------------------------------------


def test_a_current_block_that_competes_by_its_mean_breaks_causality():
    """What the rule "forced, never scored" prevents: with it earlier choices move when later keys do."""

    def competing(k: Tensor) -> Tensor:
        means_MGK = torch.stack([part.mean(0) for part in k.split(BLOCK)])
        scores = torch.einsum("thk,mhk->thm", q, means_MGK)
        current_T = torch.arange(77) // BLOCK
        scores = scores.masked_fill(torch.arange(len(means_MGK)) > current_T[:, None, None], -math.inf)
        return scores.topk(1, dim=-1).indices

    q, k, _ = rows(77, heads=1, groups=1)
    flipped = 0
    for t in range(57, 76):
        later = torch.cat([k[:t], 5 * drawn(77 - t, 1, 8, seed=5)])
        flipped += int((competing(k)[:t] != competing(later)[:t]).sum())
        chosen, again = (top_blocks(q, block_means(x, BLOCK, 0, 19), 0, BLOCK, 2) for x in (k, later))
        assert torch.equal(chosen[:t], again[:t])
    assert flipped


def test_a_finite_sentinel_would_be_chosen_and_ours_is_not():
    """With fewer candidates than places a masked block must not slip in, whatever topk returns among its ties."""
    scores_THM = -1e5 - drawn(12, 1, 3).abs()
    finite = scores_THM.masked_fill((torch.arange(3) >= torch.arange(12)[:, None] // 4)[:, None], -1e4)
    assert (finite.topk(1, dim=-1).indices[..., 0] >= torch.arange(12)[:, None] // 4).any()
    blocks_THJ = choose(scores_THM, 0, 4, 4)
    assert (blocks_THJ[..., 1:] < torch.arange(12)[:, None, None] // 4).all()
    assert (blocks_THJ[:4, :, 1:] == -1).all() and (blocks_THJ[4:8, :, 2:] == -1).all()


# --- T22: the released naive code -----------------------------------------------------------------------------------


def naive(q: Tensor, k: Tensor, v: Tensor, block: int, top_k: int, scale: float) -> Tensor:
    """MoonshotAI/MoBA's ``moba_attn_varlen_naive`` for one sequence, written anew from its steps, in fp32.

    Its gate also averages the unfinished last block, masks a block for queries that are not past its end with minus
    infinity, and forces the own block with plus infinity. (Where ``top_k`` is 1 the release turns to full attention;
    the paper does not, nor do we.)
    """
    q, k, v = q.float(), k.float(), v.float()
    tokens, heads = q.shape[:2]
    count = -(-tokens // block)
    o = torch.zeros(tokens, heads, v.shape[2])
    for h in range(heads):
        means = torch.stack([k[n * block : (n + 1) * block, h].mean(0) for n in range(count)])
        for t in range(tokens):
            gate = means @ q[t, h]
            for n in range(count):
                if t < (n + 1) * block:
                    gate[n] = math.inf if t >= n * block else -math.inf
            best = gate.topk(min(top_k, count))
            taken = {int(n) for n, score in zip(best.indices, best.values, strict=True) if score > -math.inf}
            read = [s for s in range(t + 1) if s // block in taken]
            weight = torch.stack([q[t, h] @ k[s, h] for s in read]).mul(scale).softmax(0)
            o[t, h] = sum(w * v[s, h] for w, s in zip(weight, read, strict=True))
    return o


@pytest.mark.parametrize(("tokens", "top_k"), [(27, 2), (33, 3), (24, 12)])
def test_t22_the_released_naive_code_agrees(tokens, top_k):
    q, k, v = rows(tokens, heads=2, groups=2, dtype=torch.float32)
    got = attended(SPARSE.replace(top_k=top_k), q, k, v)[0]
    close(got, naive(q, k, v, BLOCK, top_k, 0.4), 1e-5)


# --- L4, L11, MLA, refusals -----------------------------------------------------------------------------------------


def test_l4_no_parameters_and_a_dense_checkpoint_loads_as_it_is():
    dense, sparse = built(Full()), copy.deepcopy(built(SPARSE))
    report = sparse.load_state_dict(dense.state_dict())
    assert report.missing_keys == report.unexpected_keys == []
    assert [n for n, _ in sparse.named_parameters()] == [n for n, _ in dense.named_parameters()]
    assert all(spec.cost(16, PLAIN, At(9)).params == 0 for spec in VARIANTS)
    conv = CONV.cost(16, PLAIN, At(9))
    assert conv.params == conv.active_params == 2 * 8 * 3


@pytest.mark.parametrize("offset", [1, 1000, 100_000])
def test_l11_shifted_positions_leave_the_choice(offset):
    """Rotation comes before pooling, and it is relative: pooled keys only move along."""
    rope = RoPE().build(4, 8)
    q, k, v = rows()
    chosen = []
    for start in (0, offset):
        stream = replace(Stream.of_lengths([T]), positions_T=torch.arange(start, start + T))
        turned_q, turned_k = rope(q, k, stream)
        chosen.append(attended(SPARSE, turned_q, turned_k, v)[1].blocks_THJ)
    assert torch.equal(*chosen)
    unturned = attended(SPARSE, q, k, v)[1].blocks_THJ
    assert not torch.equal(chosen[0], unturned)  # it is the rotated keys that are pooled


def test_the_gate_on_latents_is_the_gate_on_expanded_keys():
    """MoBA over MLA (spec 20): means of latents and rotated keys, scored by absorbed queries, give the same scores."""
    kv = MLA(heads=3, rank=5, nope_dim=6, rope_dim=4, v_dim=7)
    module, x_TD = kv.build(10, FP32()).double(), drawn(T, 10)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=torch.Generator().manual_seed(parameter.numel()))
    pattern, memory = SPARSE.build(10, kv, FP32()), Memory([SPARSE.state(kv)], 1, torch.float64)
    with torch.no_grad():
        wide, stream = module.project(x_TD, Stream.of_lengths([T])), Stream.of_lengths([T], memory=memory)
        narrow = module.project(x_TD, stream, pattern.reads_state)
        assert wide.k_TGK.shape[1:] == (3, 10) and narrow.k_TGK.shape[1:] == (1, 9)
        gates = [
            torch.einsum("tgnk,mgk->tgnm", q.unflatten(1, (k.shape[1], -1)), block_means(k, BLOCK, 0, T // BLOCK))
            for q, k in ((wide.q_THK, wide.k_TGK), (narrow.q_THK, narrow.k_TGK))
        ]
        close(gates[1].flatten(1, 2), gates[0].flatten(1, 2), 1e-12)
        o_THV, chosen = pattern(wide, x_TD, Stream.of_lengths([T]), module.scores, None)
        absorbed, again = pattern(narrow, x_TD, stream, module.scores, memory.layers[0])
        close(module.output(absorbed, narrow), module.output(o_THV, wide), 1e-11)
    assert as_sets(chosen) == as_sets(again)
    assert memory.layers[0].part("means", BlockState).buffer.shape[2:] == (1, 9)


LATENTS = MLA(heads=4, rank=6, nope_dim=6, rope_dim=4, v_dim=6)


@pytest.mark.parametrize(("attention", "kv", "words"), [
    (CONV, LATENTS, ["attention.key_conv", "before their position code", "Use kv gqa or leave key_conv out"]),
    (SPARSE.replace(per="group"), LATENTS, ["attention.per", "one for all in decoding", "Use per: head"]),
    (SPARSE, PLAIN.replace(position=ALiBi()), ["kv.position", "moba cannot rank blocks by ALiBi"]),
    (SPARSE.replace(block=4097), PLAIN, ["attention.block", "exceeds the context"]),
], ids=["key-conv-mla", "group-mla", "alibi", "block"])
def test_impossible_pairs_are_refused_by_name(attention, kv, words):
    with pytest.raises(UsageError) as caught:
        check(model_spec(Layer(attention=attention, kv=kv, feed_forward=DENSE)))
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize(("fields", "words"), [
    ({"top_k": 2, "previous": 2}, "previous 2 and the current block exceed top_k 2"),
    ({"top_k": 0}, "expected at least 1"),
    ({"top_k": 2, "key_conv": 1}, "expected at least 2"),
    ({"top_k": 2, "min_len": -1}, "expected at least 0"),
])
def test_impossible_fields_are_refused(fields, words):
    with pytest.raises(UsageError, match=words):
        MoBA.parse({"block": 4, **fields})


# --- key-conv -------------------------------------------------------------------------------------------------------


def test_key_conv_starts_as_the_identity_and_learns():
    dense, conv = built(MoBA(block=3, top_k=2)), copy.deepcopy(built(CONV))
    tokens_T = random_tokens(T)
    close(run(conv, tokens_T, [T]), run(dense, tokens_T, [T]))
    out = conv(tokens_T, Stream.of_lengths([T])).hidden_TD
    conv.logits(out).square().sum().backward()
    taps = [p for name, p in conv.named_parameters() if "taps" in name]
    assert len(taps) == 2 and all((p.grad != 0).all() for p in taps)


@pytest.mark.parametrize("position", [RoPE(), RoPE(fraction=0.5, layout="interleaved"), NoPE()], ids=str)
@pytest.mark.parametrize("taps", [2, 3, 5])
def test_key_conv_equals_its_equation_in_loops(position, taps):
    """Mix plain keys within each document, then turn them; the module adds a turned part instead."""
    kv, lengths = PLAIN.replace(position=position), [1, 2, 9]
    module = MoBA(block=3, top_k=2, key_conv=taps).build(10, kv, FP32()).double()
    projections = kv.build(10, FP32()).double()
    assert module.key_conv is not None
    weight = torch.nn.init.normal_(module.key_conv.taps_GKW, generator=torch.Generator().manual_seed(1)).detach()
    for i, parameter in enumerate(projections.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(i))
    stream = Stream.of_lengths(lengths)
    with torch.no_grad():
        heads = projections.project(drawn(12, 10), stream)
        mixed = module.key_conv(heads, stream, None)
        want, at = torch.zeros_like(heads.plain_k_TGK), 0
        for length in lengths:
            for t in range(length):
                total = sum(weight[:, :, taps - 1 - back] * heads.plain_k_TGK[at + t - back]
                            for back in range(min(taps, t + 1)))
                want[at + t] = heads.plain_k_TGK[at + t] + F.silu(total)
            at += length
        close(mixed.plain_k_TGK, want)
        close(mixed.k_TGK, projections.position(want, want, stream)[1])


def test_key_conv_gradients_match_finite_differences():
    kv = GQA(heads=2, kv_heads=1, head_dim=4)
    module = MoBA(block=64, top_k=1, key_conv=3).build(6, kv, FP32()).double()
    stream = Stream.of_lengths([2, 5])
    q, k, v = drawn(7, 2, 4), drawn(7, 1, 4, seed=1), drawn(7, 1, 4, seed=2)

    def attention(k: Tensor, taps: Tensor) -> Tensor:
        heads = Heads(q, k, v, q, k)
        state = {"key_conv.taps_GKW": taps}
        return torch.func.functional_call(module, state, (heads, q[:, 0], stream, Scores(0.5), None))[0]

    taps = drawn(1, 4, 3, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(attention, (k.requires_grad_(), taps))


# --- T19: costs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", VARIANTS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 4, 11, 27])
def test_keys_of_the_flop_count_are_those_of_the_mask(spec, tokens):
    q, k, _ = rows(tokens)
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    keys = int((as_mask(slow_choice(spec, q, k), BLOCK) & causal)[0].sum())
    candidates = sum(t // BLOCK for t in range(tokens))
    flops = spec.cost(16, PLAIN, At(tokens)).flops * tokens
    assert flops == pytest.approx(2 * 4 * (16 * keys + 8 * candidates))


@pytest.mark.parametrize("row", [
    ((16, 1), [1, 3.6, 6.5, 10.3, 15.7]), ((64, 3), [3, 11.2, 20.4, 34.3, 61.0]),
    ((256, 12), [12, 44.7, 81.6, 137, 244]), ((1024, 16), [16, 62.5, 121, 228, 650]),
], ids=str)
def test_expected_union_is_the_table_of_spec_1_5(row):
    (blocks, chosen), expected = row
    for members, want in zip((1, 4, 8, 16, 64), expected, strict=True):
        spec = MoBA(block=8, top_k=chosen + 1)
        mean, most = spec.distinct(GQA(heads=members, kv_heads=1, head_dim=2), 8 * blocks)
        assert mean == pytest.approx(want, rel=0.012) and most == min(blocks, members * chosen)


@pytest.mark.parametrize("members", [1, 3, 8])
def test_t19_expected_union_holds_for_even_choices(members):
    """Scores that are pure noise choose evenly; 4,000 queries at the end of 64 blocks."""
    blocks, chosen, tokens = 64, 3, 4000
    scores_THM = torch.rand(tokens, 2 * members, blocks, generator=torch.Generator().manual_seed(0))
    taken_THM = torch.zeros_like(scores_THM, dtype=torch.bool).scatter_(2, scores_THM.topk(chosen).indices, True)
    measured = float(distinct(taken_THM, 2).double().mean())
    spec = MoBA(block=8, top_k=chosen + 1)
    expected, most = spec.distinct(GQA(heads=2 * members, kv_heads=2, head_dim=2), 8 * blocks)
    assert measured == pytest.approx(expected, rel=0.05) and measured <= most


def rows_read(blocks_HJ: Tensor, groups: int, tokens: int) -> int:
    """IO counter: rows of the state that one decoding step must load, summed over key heads; its own row is new."""
    total = 0
    for of_group in blocks_HJ.unflatten(0, (groups, -1)).flatten(1).tolist():
        wanted = {s for n in set(of_group) - {-1} for s in range(n * BLOCK, min((n + 1) * BLOCK, tokens))}
        total += len(wanted)
    return total


@pytest.mark.parametrize("spec", [*VARIANTS, EVERY, SPARSE.replace(decode="dense")], ids=str)
def test_t19_what_a_decoding_step_reads_is_within_the_formula(spec):
    """Exact where the choice cannot vary; at most the bound, and never less than one head would read."""
    model, tokens_T = built(spec, layers=1), random_tokens(T)
    memory = model.memory(1)
    for step, token in enumerate(tokens_T):
        with torch.no_grad():
            chosen = model(token[None], Stream.of_lengths([1], memory=memory)).selections[0]
        if not step:
            continue
        rows, means = rows_read(chosen.blocks_THJ[0], 2, step), 2 * (step // BLOCK) * 8 * 4
        nbytes = rows * 16 * 8 + means
        at = At(step, itemsize=8)
        most, alone = spec.bound(10, PLAIN, at).read_bytes, PLAIN.replace(heads=2)
        assert spec.cost(10, alone, at).read_bytes <= nbytes <= most
        assert spec.cost(10, PLAIN, at).read_bytes <= most
        if spec.per == "group" or spec in (EVERY, SPARSE.replace(decode="dense")):
            assert nbytes == spec.cost(10, PLAIN, at).read_bytes == most


def test_reading_everything_costs_what_full_attention_costs_and_the_means():
    at = At(27, itemsize=2)
    everything, plain = EVERY.cost(16, PLAIN, at), Full().cost(16, PLAIN, at)
    means, gate = 2 * 6 * 8 * 4, 2 * 4 * 8 * sum(t // BLOCK for t in range(27))
    assert everything.read_bytes == plain.read_bytes + means
    assert everything.state_bytes == plain.state_bytes + means
    assert everything.flops * 27 == pytest.approx(plain.flops * 27 + gate)


def test_costs_of_a_million_tokens_take_no_loop():
    """The paper's setting at 1 M tokens: 11 of 256 past blocks chosen by each of 4 heads."""
    spec, kv = MoBA(block=4096, top_k=12), GQA(heads=32, kv_heads=8, head_dim=128)
    expected, most = spec.distinct(kv, 2**20)
    assert expected == pytest.approx(256 * (1 - (1 - 11 / 256) ** 4)) and most == 44
    sparse, plain = (pattern.cost(4096, kv, At(2**20)) for pattern in (spec, Full()))
    assert 11 < plain.flops / sparse.flops < 12 and plain.read_bytes / sparse.read_bytes > 6


def test_walks_the_sequences_of_a_step():
    """The helper that every selecting pattern builds on keeps places: queries of a chunk lie at the end of the keys."""
    q, k, v = rows(9)
    found = list(sequences(Heads(q, k, v), Stream.of_lengths([4, 0, 5]), None))
    assert [(own.index, own.first, len(own.k_SGK)) for own in found] == [(0, 0, 4), (2, 0, 5)]
