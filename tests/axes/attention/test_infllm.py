"""InfLLM against a token-by-token reading of its equations, and what its shared tests cannot see: angles, sums, blocks
of queries, refusals."""

import math

import pytest
import torch
from cases import DENSE, MOE, PLAIN, built, chunked, close, model_spec, params, random_tokens, run
from torch import Tensor

from sextant.axes.attention import Full, InfLLM
from sextant.axes.kv import GQA, NoPE, RoPE
from sextant.axes.kv.base import Heads
from sextant.axes.kv.position import YaRNScaling
from sextant.core.cost import At
from sextant.core.errors import UsageError
from sextant.core.state import JointState, RecurrentState
from sextant.core.stream import Stream
from sextant.kernels.attention import Scores
from sextant.model.checks import check
from sextant.model.spec import Layer

SPECS = [
    InfLLM(block=2, sinks=2, window=4, top_k=2, representatives=1),
    InfLLM(block=3, sinks=3, window=3, top_k=1, representatives=2, per="head"),
    InfLLM(block=2, sinks=0, window=5, top_k=2, representatives=2, per="head"),
]
POSITIONS = [RoPE(), NoPE(), RoPE(scaling=YaRNScaling(factor=4.0, original=16))]
SCALE = 8**-0.5


def kv_of(position, heads: int = 4, groups: int = 2) -> GQA:
    return GQA(heads=heads, kv_heads=groups, head_dim=8, position=position)


def step(kv: GQA, tokens: int, seed: int = 0) -> tuple[Heads, Stream]:
    """Random queries, keys and values of one sequence in fp64 that want gradients."""
    make = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(tokens, n, 8, dtype=torch.float64, generator=make) for n in (4, kv.kv_heads, kv.kv_heads))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    stream = Stream.of_lengths([tokens])
    turned_q, turned_k = kv.position.build(kv.heads, 8)(q, k, stream)
    return Heads(turned_q, turned_k, v, q, k), stream


def one_by_one(spec: InfLLM, kv: GQA, heads: Heads) -> tuple[Tensor, list[set[int]]]:
    """Every query by itself, from the equations; also the far blocks that head 0 chose for each query."""
    position, tokens = kv.position.build(kv.heads, 8), len(heads.q_THK)
    each = kv.heads // kv.kv_heads
    k, v, plain_k = (x.repeat_interleave(each, 1) for x in (heads.k_TGK, heads.v_TGV, heads.plain_k_TGK))
    at_window = Stream(torch.full((tokens,), spec.window), torch.tensor([0, tokens]), tokens)
    at_zero = Stream(torch.zeros(tokens, dtype=torch.int64), torch.tensor([0, tokens]), tokens)
    far_q, far_k = position(heads.plain_q_THK, plain_k, at_window)[0], position(plain_k, plain_k, at_zero)[1]
    received = torch.zeros(tokens, kv.heads, dtype=torch.float64)
    memory: dict[int, Tensor] = {}
    outputs, chose = [], []
    for p in range(tokens):
        near = range(max(0, p - spec.window + 1), p + 1)
        far = max(0, p - spec.window + 1)  # keys 0 to far - 1 lie before the window
        finished = max(0, p - spec.window) // spec.block  # by the queries before this one
        liked = {m: far_q[p].detach() @ memory[m].t() for m in range(spec.sinks // spec.block, finished)}
        o = []
        for h in range(kv.heads):
            value = {m: float(s[h, h] if spec.per == "head" else s.diagonal().sum()) for m, s in liked.items()}
            best = set(sorted(value, key=lambda m: -value[m])[: spec.top_k])
            if h == 0:
                chose.append(best)
            read = [s for s in range(far) if s < spec.sinks or s // spec.block in best or s // spec.block >= finished]
            logits = [heads.q_THK[p, h] @ k[s, h] * SCALE for s in near]
            logits += [far_q[p, h] @ far_k[s, h] * SCALE for s in read]
            o.append(torch.stack(logits).softmax(0) @ v[[*near, *read], h])
            received[list(near), h] += torch.stack(logits[: len(near)]).softmax(0).detach()
        outputs.append(torch.stack(o))
        for m in range((p + 1 - spec.window) // spec.block if p + 1 >= spec.window else 0):
            here = slice(m * spec.block, (m + 1) * spec.block)
            best_SH = received[here].topk(spec.representatives, dim=0).indices
            rows = [plain_k[here][best_SH[:, h], h].mean(0).detach() for h in range(kv.heads)]
            memory.setdefault(m, torch.stack(rows))
    return torch.stack(outputs), chose


@pytest.mark.parametrize("position", params(POSITIONS))
@pytest.mark.parametrize("spec", params(SPECS))
def test_equals_the_equations_forward_and_backward(spec, position):
    kv = kv_of(position)
    heads, stream = step(kv, 23)
    inputs = (heads.plain_q_THK, heads.plain_k_TGK, heads.v_TGV)
    module = spec.build(32, kv, None).eval()
    want_THV, chose = one_by_one(spec, kv, heads)
    got_THV, selection = module(heads, torch.zeros(23, 1), stream, Scores(SCALE), None)
    close(got_THV, want_THV)
    for p, best in enumerate(chose):
        assert set(selection.blocks_THJ[p, 0].tolist()) >= best
    assert len({frozenset(best) for best in chose}) > 3
    weight_THV = torch.randn_like(want_THV)
    wants = torch.autograd.grad((want_THV * weight_THV).sum(), inputs, retain_graph=True)
    for got, want in zip(torch.autograd.grad((got_THV * weight_THV).sum(), inputs), wants, strict=True):
        close(got, want, 1e-10)


@pytest.mark.parametrize("window", [27, 64])
def test_window_that_covers_the_sequence_is_full_attention(window):
    """T1."""
    model = built(InfLLM(block=2, sinks=2, window=window, top_k=1, representatives=1))
    close(run(model, random_tokens(27), [27]), run(built(Full()), random_tokens(27), [27]))


def test_all_blocks_without_position_codes_are_full_attention():
    """T1 beyond the window: near, far and what is not finished are disjoint and leave nothing out."""
    kv = PLAIN.replace(position=NoPE())
    for spec in (SPECS[0].replace(top_k=99), SPECS[1].replace(top_k=99), SPECS[2].replace(top_k=99, exec_block=4)):
        close(run(built(spec, kv), random_tokens(31), [31]), run(built(Full(), kv), random_tokens(31), [31]))


def test_far_distance_does_not_matter():
    """All far keys lie at one distance: two chosen blocks may change places, values with them."""
    spec, kv = InfLLM(block=2, sinks=0, window=2, top_k=99, representatives=2), kv_of(RoPE())
    heads, stream = step(kv, 12)
    order_T = torch.tensor([4, 5, 2, 3, 0, 1, *range(6, 12)])
    with torch.no_grad():
        k, v = heads.plain_k_TGK[order_T], heads.v_TGV[order_T]
        turned_k = kv.position.build(4, 8)(k, k, stream)[0]
        swapped = Heads(heads.q_THK, turned_k, v, heads.plain_q_THK, k)
        module = spec.build(32, kv, None).eval()
        a, b = (module(h, torch.zeros(12, 1), stream, Scores(SCALE), None)[0] for h in (heads, swapped))
    close(a[8:], b[8:])
    assert (a[3:6] - b[3:6]).abs().max() > 1e-3


def test_keys_outside_the_choice_get_no_gradient():
    """T10, exact."""
    spec, kv = InfLLM(block=2, sinks=2, window=2, top_k=1, representatives=1), kv_of(RoPE())
    heads, stream = step(kv, 15)
    module = spec.build(32, kv, None).eval()
    o_THV, selection = module(heads, torch.zeros(15, 1), stream, Scores(SCALE), None)
    (v_grad,) = torch.autograd.grad(o_THV[14].square().sum(), (heads.v_TGV,))
    read = {s for m in selection.blocks_THJ[14, 0].tolist() if m >= 0 for s in (2 * m, 2 * m + 1)} | {13, 14}
    assert 0 < len(read) < 15
    assert {s for s in range(15) if v_grad[s].any()} == read


def received(memory) -> Tensor:
    """The running sums of the first layer."""
    state = memory.layers[0]
    assert isinstance(state, JointState)
    return state.part("notes", JointState).part("received", RecurrentState).now[0]


def test_attention_received_does_not_depend_on_how_tokens_come():
    model, tokens_T = built(SPECS[0]), random_tokens(19)
    sums = []
    for sizes in ([19], [1] * 19, [4, 3, 7, 5]):
        memory = model.memory(1)
        chunked(model, tokens_T, sizes, memory)
        sums.append(received(memory))
    close(sums[1], sums[0])
    close(sums[2], sums[0])
    window = SPECS[0].window
    assert sums[0][-1].max() <= 1 + 1e-12 and sums[0].max() <= window  # a key receives at most 1 from each query
    close(sums[0][-window:].sum(0) + sums[0][:-window].sum(0), sums[0].sum(0))


def test_rolled_back_sums_are_those_before(monkeypatch):
    """Not only to a tolerance in what is read from them: after a draft is taken back the sums themselves are back."""
    model, tokens_T, draft_T = built(SPECS[0]), random_tokens(30), random_tokens(3, seed=5)
    memory = model.memory(1, undo=3)
    for at in range(30):
        run(model, tokens_T[at : at + 1], [1], memory)
        before = received(memory).clone()
        run(model, draft_T, [3], memory)
        assert (received(memory) - before).abs().max() > 1e-3
        memory.rollback(3)
        close(received(memory), before, 1e-14)


def test_chunks_of_the_window_pass_are_invisible(monkeypatch):
    from sextant.axes.attention import infllm

    model, tokens_T = built(SPECS[1]), random_tokens(40)
    whole_TP = run(model, tokens_T, [40])
    monkeypatch.setattr(infllm, "CHUNK", 7)
    close(run(model, tokens_T, [40]), whole_TP)


EXEC = InfLLM(block=2, sinks=2, window=6, top_k=2, representatives=1, exec_block=5)


def test_exec_block_is_causal_between_its_blocks_only():
    """The named exemption: a choice depends on later tokens of its exec block, on none of a later one."""
    model, tokens_T = built(EXEC, layers=1), random_tokens(40)
    inside = 0.0
    for changed in (23, 24, 38, 39):
        other_T = tokens_T.clone()
        other_T[changed] = (other_T[changed] + 7) % 23
        moved_T = (run(model, other_T, [40]) - run(model, tokens_T, [40])).abs().amax(-1)
        first = changed // 5 * 5
        assert moved_T[:first].max() < 1e-12
        inside = max(inside, moved_T[first:changed].max().item())
    assert inside > 1e-6


def test_exec_blocks_agree_when_chunks_end_with_them():
    model, tokens_T = built(EXEC, PLAIN, MOE), random_tokens(38)
    whole_TP = run(model, tokens_T, [38])
    for sizes in ([5] * 7, [10, 15, 5], [20, 18]):
        close(chunked(model, tokens_T, sizes), whole_TP)
    assert (chunked(model, tokens_T, [1] * 38) - whole_TP).abs().max() > 1e-6


def test_training_is_full_attention():
    heads, stream = step(PLAIN, 17)
    module = SPECS[0].build(32, PLAIN, None).train()
    o_THV, selection = module(heads, torch.zeros(17, 1), stream, Scores(SCALE), None)
    want_THV, _ = Full().build(32, PLAIN, None)(heads, torch.zeros(17, 1), stream, Scores(SCALE), None)
    assert selection is None and torch.equal(o_THV, want_THV)


@pytest.mark.parametrize("kind", ["equal keys", "huge keys", "one sink"])
def test_ties_and_large_numbers(kind):
    """T24: finite, and the same twice."""
    heads, stream = step(PLAIN, 21)
    with torch.no_grad():
        k = heads.plain_k_TGK.clone()
        k = torch.ones_like(k) if kind == "equal keys" else k * 1e4 if kind == "huge keys" else k
        k[0] = k[0] * 100 if kind == "one sink" else k[0]
        turned_k = PLAIN.position.build(4, 8)(k, k, stream)[0]
        odd = Heads(heads.q_THK, turned_k, heads.v_TGV, heads.plain_q_THK, k)
        module = SPECS[0].build(32, PLAIN, None).eval()
        a, b = (module(odd, torch.zeros(21, 1), stream, Scores(SCALE), None) for _ in range(2))
    assert a[0].isfinite().all() and torch.equal(a[0], b[0]) and torch.equal(a[1].blocks_THJ, b[1].blocks_THJ)


def test_half_precision_is_near():
    """Sums, representatives and merging stay fp32: the error is that of rounded inputs."""
    kv = kv_of(RoPE())
    heads, stream = step(kv, 40)
    low = Heads(*(x.detach().bfloat16() for x in (heads.q_THK, heads.k_TGK, heads.v_TGV)),
                *(x.detach().bfloat16() for x in (heads.plain_q_THK, heads.plain_k_TGK)))
    high = Heads(*(x.double() for x in (low.q_THK, low.k_TGK, low.v_TGV, low.plain_q_THK, low.plain_k_TGK)))
    module = SPECS[0].replace(top_k=99).build(32, kv, None).eval()
    a, b = (module(h, torch.zeros(40, 1), stream, Scores(SCALE), None)[0] for h in (low, high))
    assert a.dtype == torch.bfloat16
    torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("tokens", [1, 4, 5, 9, 27, 40])
@pytest.mark.parametrize("spec", params(SPECS))
def test_cost_counts_keys_read_and_blocks_scored(spec, tokens):
    """By the pairs that a built layer reads."""
    kv = kv_of(RoPE())
    heads, stream = step(kv, tokens)
    _, selection = spec.build(32, kv, None).eval()(heads, torch.zeros(tokens, 1), stream, Scores(SCALE), None)
    pairs = scored = 0
    for p in range(tokens):
        pairs += min(p + 1, spec.window)
        blocks = {m for m in selection.blocks_THJ[p, 0].tolist() if m >= 0}
        pairs += sum(s // spec.block in blocks for s in range(max(0, p - spec.window + 1)))
        scored += max(0, max(0, p - spec.window) // spec.block - spec.sinks // spec.block)
    cost = spec.cost(32, kv, At(tokens, 8))
    assert cost.flops * tokens == pytest.approx(2 * 4 * (16 * pairs + 8 * scored))


def test_a_step_reads_what_the_cost_says():
    """One choice for all heads, deep in a long sequence: window, sinks, chosen blocks, notes."""
    spec, kv = InfLLM(block=8, sinks=8, window=16, top_k=3, representatives=2), kv_of(RoPE())
    cost = spec.cost(32, kv, At(200, 2))
    finished = (200 - 16) // 8
    rows = 16 + 8 + 3 * 8 + (200 - 16) % 8
    assert cost.read_bytes == rows * 2 * 16 * 2 + 4 * 4 * (finished * 8 + 24)
    assert cost.read_bytes < cost.state_bytes


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sinks": 3}, "sinks 3 must be whole blocks of 2"),
        ({"representatives": 3}, "representatives 3 exceed the block of 2"),
        ({"exec_block": 5}, "exec_block 5 exceeds the window of 4"),
    ],
)
def test_impossible_settings_are_refused(fields, words):
    with pytest.raises(UsageError, match=words):
        SPECS[0].replace(**fields)


def test_a_model_with_memory_of_blocks_larger_than_its_context_is_refused():
    layer = Layer(attention=SPECS[0].replace(block=4098, sinks=0, representatives=1), kv=PLAIN, feed_forward=DENSE)
    with pytest.raises(UsageError, match="block 4098 exceeds the context 4096"):
        check(model_spec(layer))


def test_reads_stop_growing():
    """What the memory is for: beyond the window a step reads a fixed number of rows, and the notes of the blocks."""
    spec, kv = InfLLM(block=128, sinks=128, window=4096, top_k=16), kv_of(RoPE(), 4, 4)
    reads = [spec.cost(32, kv, At(n * 2**10, 2)).read_bytes for n in (32, 64, 128)]
    full = [Full().cost(32, kv, At(n * 2**10, 2)).read_bytes for n in (32, 64, 128)]
    assert math.isclose(reads[2] - reads[1], 64 * 2**10 / 128 * 4 * 4 * 8)
    assert [int(f / r) for f, r in zip(full, reads, strict=True)] > [4, 8, 16]
