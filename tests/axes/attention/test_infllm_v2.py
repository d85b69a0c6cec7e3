"""InfLLM-V2 against loops written from its description in fp64; the property tests of spec sparse-attention 15."""

import pytest
import torch
from cases import close, params
from pydantic import ValidationError
from torch import Tensor

from sextant.axes.attention import InfLLMV2
from sextant.axes.kv import GQA
from sextant.axes.kv.base import Heads
from sextant.axes.numerics import FP32
from sextant.core.cost import At
from sextant.core.state import Memory
from sextant.core.stream import Stream
from sextant.kernels.attention import Scores, attend_dense, compressed

T, SCALE = 29, 0.6
SMALL = InfLLMV2(block=4, length=4, stride=2, top_k=2, initial=1, window=4, dense_len=0)
KV = GQA(heads=6, kv_heads=2, head_dim=6, v_head_dim=3)
CASES = params(
    [
        (SMALL, KV),
        (SMALL.replace(window=8, initial=0, top_k=1), KV.replace(heads=3, kv_heads=3)),
        (SMALL.replace(length=2, block=2, window=2, top_k=4), KV.replace(heads=5, kv_heads=1)),
        (SMALL.replace(dense_len=17), KV),
        (SMALL.replace(dense_len=T + 5), KV),
    ]
)


def rows(kv: GQA, tokens: int = T) -> tuple[Tensor, Tensor, Tensor]:
    heads, groups, k_dim, v_dim = kv.shape
    shapes = (tokens, heads, k_dim), (tokens, groups, k_dim), (tokens, groups, v_dim)
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return q, k, v


def attended(spec: InfLLMV2, kv: GQA, q: Tensor, k: Tensor, v: Tensor, stream: Stream | None = None, state=None):
    module = spec.build(8, kv, FP32())
    return module(Heads(q, k, v), q.flatten(1), stream or Stream.of_lengths([len(q)]), Scores(SCALE), state)


def sets(blocks_TGJ: Tensor) -> list[list[set[int]]]:
    return [[{j for j in places if j >= 0} for places in row] for row in blocks_TGJ.tolist()]


def choice(spec: InfLLMV2, kv: GQA, q: Tensor, k: Tensor, t: int, g: int) -> set[int]:
    """Blocks that query t reads for group g, by loops over windows and blocks (2509.24663; spec section 7)."""
    current = t // spec.block
    if t < spec.dense_len:
        return set(range(current + 1))
    starts = [s for s in range(0, t + 1, spec.stride) if s + spec.length - 1 <= t]
    pooled = [k[s : s + spec.length, g].mean(0) for s in starts]
    per_group, weights = kv.heads // kv.kv_heads, [0.0] * len(starts)
    for h in range(g * per_group, (g + 1) * per_group):
        if starts:
            logits = torch.stack([q[t, h] @ key * SCALE for key in pooled])
            weights = [w + p for w, p in zip(weights, logits.softmax(0).tolist(), strict=True)]
    forced = {j for j in range(current + 1) if j < spec.initial or j > current - spec.window // spec.block}
    best = []
    for j in range(current):
        first, last = j * spec.block, (j + 1) * spec.block - 1
        touching = [w for s, w in zip(starts, weights, strict=True) if s <= last and s + spec.length - 1 >= first]
        best.append(max(touching))
    rest = sorted((j for j in range(current) if j not in forced), key=lambda j: (-best[j], j))
    return forced | set(rest[: spec.top_k + spec.window // spec.block - len(forced)])


@pytest.mark.parametrize(("spec", "kv"), CASES)
def test_equals_loops_and_a_dense_mask(spec, kv):
    """Choices by loops; output and gradients by one dense softmax over them (T2)."""
    q, k, v = rows(kv)
    got, selection = attended(spec, kv, q, k, v)
    chosen = [[choice(spec, kv, q.detach(), k.detach(), t, g) for g in range(kv.kv_heads)] for t in range(T)]
    assert sets(selection.blocks_THJ) == chosen
    assert selection.block == spec.block
    per_group = kv.heads // kv.kv_heads
    mask_HTS = torch.tensor(
        [[[s <= t and s // spec.block in chosen[t][h // per_group] for s in range(T)] for t in range(T)]
         for h in range(kv.heads)]
    )
    want, _ = attend_dense(q, k, v, mask_HTS, Scores(SCALE))
    close(got, want)
    weight = torch.randn_like(got)
    ours, theirs = (torch.autograd.grad((o * weight).sum(), (q, k, v)) for o in (got, want))
    for g, w in zip(ours, theirs, strict=True):
        close(g, w, 1e-10)


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend_dense(q, k, v, torch.ones(len(q), len(q), dtype=torch.bool).tril(), Scores(SCALE))[0]


def test_all_blocks_are_full_attention_and_few_are_not():
    """T1 and T10, through the choice and through ``dense_len``."""
    q, k, v = rows(KV)
    for spec, same in ((SMALL.replace(top_k=9), True), (SMALL.replace(dense_len=T), True), (SMALL, False)):
        assert torch.allclose(attended(spec, KV, q, k, v)[0], full(q, k, v), rtol=1e-10, atol=1e-10) is same


def test_a_long_sequence_is_dense_up_to_the_switch():
    """A token's own length decides, so a prompt, its prefix and its tokens one by one agree."""
    spec, (q, k, v) = SMALL.replace(dense_len=17), rows(KV)
    got, want, sparse = attended(spec, KV, q, k, v)[0], full(q, k, v), attended(SMALL, KV, q, k, v)[0]
    close(got[:17], want[:17])
    close(got[17:], sparse[17:])
    assert (got[17:] - want[17:]).abs().amax() > 1e-3


def test_it_has_no_parameters():
    assert list(SMALL.build(8, KV, FP32()).parameters()) == []
    assert SMALL.cost(8, KV, At(64)).params == 0


def test_the_published_count_of_blocks():
    """1 initial, 63 chosen, 32 local: 96 blocks, 6,144 tokens (2509.24663, section 4.1)."""
    spec = InfLLMV2()
    assert (spec.blocks, spec.blocks * spec.block, spec.local) == (96, 6144, 32)


def test_tokens_change_nothing_before_them_not_one_bit():
    """T3 and T4."""
    for spec in (SMALL, SMALL.replace(dense_len=9)):
        q, k, v = (x.detach() for x in rows(KV))
        before, choice_before = attended(spec, KV, q, k, v)
        for t in (3, 8, 9, 20):
            later = [torch.cat([x[: t + 1], 5 * x[t + 1 :]]) for x in (q, k, v)]
            after, choice_after = attended(spec, KV, *later)
            assert torch.equal(after[: t + 1], before[: t + 1])
            assert torch.equal(choice_after.blocks_THJ[: t + 1], choice_before.blocks_THJ[: t + 1])
            close(attended(spec, KV, *(x[: t + 1] for x in (q, k, v)))[0][-1], before[t], 1e-12)


@torch.no_grad()
@pytest.mark.parametrize(("spec", "kv"), CASES)
def test_packed_chunked_and_stepwise(spec, kv):
    """T5 and T6: lengths around a block; pooled keys are made once and never again."""
    lengths = [1, 3, 4, 5, 19]
    q, k, v = rows(kv, sum(lengths))
    packed = attended(spec, kv, q, k, v, Stream.of_lengths(lengths))[0].split(lengths)
    for rows_out, *own in zip(packed, *(x.split(lengths) for x in (q, k, v)), strict=True):
        close(attended(spec, kv, *own)[0], rows_out, 1e-12)
    for sizes in ([1] * 19, [6, 1, 1, 11], [2, 17]):
        memory, at, pieces = Memory([spec.state(kv)], 1, torch.float64), sum(lengths) - 19, []
        for size in sizes:
            stream = Stream.of_lengths([size], memory=memory)
            piece = [x[at : at + size] for x in (q, k, v)]
            pieces.append(attended(spec, kv, *piece, stream, memory.layers[0])[0])
            memory.commit(stream)
            at += size
        close(torch.cat(pieces), packed[-1], 1e-12)


@torch.no_grad()
@pytest.mark.parametrize(("spec", "kv"), CASES)
def test_read_bytes_are_what_a_step_reads(spec, kv):
    """Rows of the chosen blocks, pooled keys where they are scored (fp32 by declaration), and a window pooled in it."""
    q, k, v = rows(kv)
    for tokens in (1, 4, 9, 18, T):
        memory = Memory([spec.state(kv)], 1, torch.float64)
        for start, stop in ((0, tokens - 1), (tokens - 1, tokens)):
            if start < stop:
                stream = Stream.of_lengths([stop - start], memory=memory)
                piece = [x[start:stop] for x in (q, k, v)]
                _, selection = attended(spec, kv, *piece, stream, memory.layers[0])
                memory.commit(stream)
        read = sum(s // spec.block in chosen for chosen in sets(selection.blocks_THJ)[-1] for s in range(tokens))
        complete, before = spec.grid.complete(tokens), spec.grid.complete(tokens - 1)
        pooled = 4 * complete if tokens > spec.dense_len else 0
        fresh = 8 * (complete - before) * spec.length
        want = read * 8 * (kv.head_dim + kv.shape[3]) + kv.kv_heads * kv.head_dim * (pooled + fresh)
        assert spec.cost(8, kv, At(tokens, 8)).read_bytes == want


@pytest.mark.parametrize(("spec", "kv"), CASES)
def test_flops_by_masks(spec, kv):
    """Keys that each query reads, and windows that a sparse query scores."""
    q, k, v = rows(kv)
    chosen = sets(attended(spec, kv, q, k, v)[1].blocks_THJ)
    keys = sum(s // spec.block in chosen[t][0] for t in range(T) for s in range(t + 1))
    windows = sum(max(0, (t + 1 - spec.length) // spec.stride + 1) for t in range(spec.dense_len, T))
    want = 2 * kv.heads * ((kv.head_dim + kv.shape[3]) * keys + kv.head_dim * windows)
    assert spec.cost(8, kv, At(T)).flops * T == pytest.approx(want)


def test_pieces_of_queries_change_nothing(monkeypatch):
    q, k, v = rows(KV, 111)
    whole, choice_whole = attended(SMALL, KV, q, k, v)
    monkeypatch.setattr(compressed, "PIECE_BYTES", 2**12)
    pieces, choice_pieces = attended(SMALL, KV, q, k, v)
    close(pieces, whole)
    assert torch.equal(choice_pieces.blocks_THJ, choice_whole.blocks_THJ)


@pytest.mark.parametrize("kind", ["equal keys", "huge keys", "zero queries"])
def test_ties_and_extremes(kind):
    """T24: no NaN, the same choice twice."""
    q, k, v = (x.detach() for x in rows(KV))
    if kind == "equal keys":
        k = k[:1].expand(T, -1, -1)
    elif kind == "zero queries":
        q = torch.zeros_like(q)
    else:
        k = k * 1e6
    one, two = (attended(SMALL, KV, q, k, v) for _ in range(2))
    assert torch.equal(one[1].blocks_THJ, two[1].blocks_THJ)
    assert one[0].isfinite().all()
    if kind == "zero queries":  # every window weighs alike, so the lowest blocks win beside the forced ones
        assert sets(one[1].blocks_THJ)[-1] == [{0, 1, 7}] * 2


REFUSED = {
    "length": ({"length": 3}, "length 3 must be a multiple of stride 2"),
    "block": ({"block": 5, "window": 5}, "block 5 must be a multiple of stride 2"),
    "longer than a block": ({"length": 6}, "length 6 exceeds block 4"),
    "window": ({"window": 6}, "window 6 must be a multiple of block 4"),
    "initial": ({"initial": 3}, "initial 3 exceeds top_k 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case):
    fields, words = REFUSED[case]
    with pytest.raises(ValidationError, match=words):
        InfLLMV2.model_validate({**SMALL.model_dump(), **fields})
