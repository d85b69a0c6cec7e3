"""The gates of SeerAttention: scores and loss against their equations, rules, sizes, and who gets which gradient."""

import math

import pytest
import torch
from cases import DENSE, PLAIN, built, chunked, close, model_spec, params, random_tokens, run
from torch import Tensor

from sextant.axes.attention import Full, Seer, SeerR
from sextant.axes.attention.rows import Rows
from sextant.axes.attention.seer import Budget, Density, Threshold
from sextant.axes.kv import GQA, NoPE, RoPE
from sextant.axes.kv.base import Heads
from sextant.axes.stability import RMSNorm
from sextant.core.cost import At
from sextant.core.errors import UsageError
from sextant.core.state import BlockState, JointState
from sextant.core.stream import Stream
from sextant.kernels.attention import Scores
from sextant.model.checks import check
from sextant.model.spec import Layer

SCALE, BLOCK = 8**-0.5, 3
RULE = Budget(tokens=6)
GATES = [
    Seer(block=BLOCK, pool="none", rule=RULE),
    Seer(block=BLOCK, rule=RULE),
    Seer(block=BLOCK, width=6, rule=RULE, loss_scale=10.0),
    Seer(block=BLOCK, pool="none", width=4, rule=RULE),
    SeerR(block=BLOCK, width=6, rule=RULE),
    SeerR(block=BLOCK, width=4, qk_norm=RMSNorm(), rule=RULE, loss_scale=2.0),
]


def step(kv: GQA, tokens: int, seed: int = 0) -> tuple[Heads, Stream]:
    """Random queries, keys and values of one sequence in fp64 that want gradients."""
    make = torch.Generator().manual_seed(seed)
    shapes = [(tokens, n, kv.head_dim) for n in (kv.heads, kv.kv_heads, kv.kv_heads)]
    q, k, v = (torch.randn(shape, dtype=torch.float64, generator=make).requires_grad_() for shape in shapes)
    stream = Stream.of_lengths([tokens])
    turned_q, turned_k = kv.position.build(kv.heads, kv.head_dim)(q, k, stream)
    return Heads(turned_q, turned_k, v, q, k), stream


def layer_of(spec, kv=PLAIN):
    """A layer in fp64 whose gate has weights to speak of."""
    module = spec.build(32, kv, None).double()
    make = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7, generator=make)
    return module


def apply(module, heads: Heads, stream: Stream):
    return module(heads, torch.zeros(len(heads.q_THK), 1), stream, Scores(SCALE), None)


def turn(row: Tensor, place: int) -> Tensor:
    """Rotary code of one row, half-split, base 10,000, by complex numbers."""
    half = len(row) // 2
    angle = place * 10_000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(row[:half], row[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag])


def rms(row: Tensor, gain: Tensor) -> Tensor:
    return row / (row.square().mean() + 1e-6).sqrt() * gain


def slow_scores(spec, gate, heads: Heads, kv: GQA) -> dict[tuple[int, int, int], Tensor]:
    """Scores of (query, chooser, past block), one at a time."""
    q, k = heads.plain_q_THK, heads.plain_k_TGK
    tokens, shape = len(q), spec.shape(kv)
    size = BLOCK if isinstance(spec, Seer) and spec.pool == "block" else 1
    norms = isinstance(spec, SeerR) and spec.qk_norm
    found = {}
    for t in range(tokens):
        row = slice(t // size * size, min(tokens, t // size * size + size))
        for n in range(shape.choosers):
            per = kv.heads // shape.choosers
            query = q[row, n * per : (n + 1) * per].mean(0).flatten()
            query = query if gate.query_HDR is None else query @ gate.query_HDR[n]
            query = turn(rms(query, gate.q_norm.gain) if norms else query, row.start)
            for m in range(t // BLOCK):
                x = k[m * BLOCK : (m + 1) * BLOCK, n * kv.kv_heads // shape.choosers]
                pooled = torch.cat([x.max(0).values, x.min(0).values, x.mean(0)])
                key = pooled @ gate.key_HDR[n * shape.keys // shape.choosers]
                key = turn(rms(key, gate.k_norm.gain) if norms else key, m * BLOCK)
                found[t, n, m] = query @ key / math.sqrt(shape.width)
    return found


def slow_loss(spec, scores, heads: Heads, kv: GQA) -> Tensor:
    """KL of block maxima of the whole attention map to the gate, per query, mean over choosers, summed."""
    tokens, choosers = len(heads.q_THK), spec.shape(kv).choosers
    k_SHK = heads.k_TGK.repeat_interleave(kv.heads // kv.kv_heads, 1)
    map_HTS = torch.einsum("thk,shk->hts", heads.q_THK, k_SHK).detach() * SCALE
    map_HTS = map_HTS.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf).softmax(-1)
    size = BLOCK if isinstance(spec, Seer) and spec.pool == "block" else 1
    total = torch.zeros((), dtype=torch.float64)
    for t in range(BLOCK, tokens):
        for n in range(choosers):
            per = kv.heads // choosers
            part = map_HTS[n * per : (n + 1) * per, t // size * size : t // size * size + size]
            truth = torch.stack([part[..., m * BLOCK : (m + 1) * BLOCK].max() for m in range(t // BLOCK)])
            logs = torch.stack([scores[t, n, m] for m in range(t // BLOCK)]).log_softmax(0)
            truth = truth / truth.sum()
            total = total + (truth * (truth.log() - logs)).sum() / choosers
    return spec.loss_scale * total


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 17])
@pytest.mark.parametrize("spec", params(GATES))
def test_scores_and_loss_are_the_equations(spec, tokens):
    """Values, and gradients of every gate parameter."""
    heads, stream = step(PLAIN, tokens)
    module = layer_of(spec).train()
    _, selection = apply(module, heads, stream)
    scores = slow_scores(spec, module.gate, heads, PLAIN)
    want = slow_loss(spec, scores, heads, PLAIN)
    close(selection.loss, want)
    if tokens > 2 * BLOCK:
        assert want > 0.1
        wants = torch.autograd.grad(want, list(module.gate.parameters()), retain_graph=True)
        gots = torch.autograd.grad(selection.loss, list(module.gate.parameters()))
        for got, want_grad in zip(gots, wants, strict=True):
            close(got, want_grad, 1e-10)


def test_loss_of_packed_sequences_is_the_sum_of_theirs():
    spec, pieces = GATES[4], [step(PLAIN, n, seed=n)[0] for n in (7, 2, 11)]
    module = layer_of(spec).train()
    apart = [apply(module, heads, Stream.of_lengths([len(heads.q_THK)]))[1].loss for heads in pieces]
    names = ("q_THK", "k_TGK", "v_TGV", "plain_q_THK", "plain_k_TGK")
    packed = Heads(*(torch.cat([getattr(heads, name) for heads in pieces]) for name in names))
    _, selection = apply(module, packed, Stream.of_lengths([7, 0, 2, 11]))
    close(selection.loss, torch.stack(apart).sum())
    assert selection.blocks_THJ.shape[0] == 20


@pytest.mark.parametrize("spec", params(GATES))
def test_training_is_full_attention_and_the_two_losses_share_no_gradient(spec):
    """The gate learns nothing from the output, the base nothing from the gate's loss (rule 5)."""
    heads, stream = step(PLAIN, 17)
    module = layer_of(spec).train()
    o_THV, selection = apply(module, heads, stream)
    assert torch.equal(o_THV, apply(Full().build(32, PLAIN, None), heads, stream)[0])
    inputs = (heads.plain_q_THK, heads.plain_k_TGK, heads.v_TGV)
    base = torch.autograd.grad(selection.loss, inputs, retain_graph=True, allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in base)
    gate = list(module.gate.parameters())
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(selection.loss, gate))
    assert torch.autograd.grad(o_THV.sum(), gate, allow_unused=True) == (None,) * len(gate)
    o_THV, _ = apply(module.eval(), heads, stream)
    assert torch.autograd.grad(o_THV.sum(), gate, allow_unused=True) == (None,) * len(gate)


@pytest.mark.parametrize("spec", params(GATES))
def test_a_whole_budget_is_full_attention(spec):
    """T1, for each rule."""
    heads, stream = step(PLAIN, 20)
    want_THV, _ = apply(Full().build(32, PLAIN, None), heads, stream)
    for rule in (Budget(tokens=99), Threshold(share=1e-200), Density(share=1.0)):
        close(apply(layer_of(spec.replace(rule=rule)).eval(), heads, stream)[0], want_THV)
    assert (apply(layer_of(spec).eval(), heads, stream)[0] - want_THV).abs().max() > 1e-3


@pytest.mark.parametrize("spec", params(GATES[:1] + GATES[4:5]))
@pytest.mark.parametrize("rule", [Budget(tokens=2), Budget(tokens=9), Threshold(share=0.3), Density(share=0.5)])
def test_rules_choose_by_the_slow_scores(spec, rule):
    spec = spec.replace(rule=rule)
    heads, stream = step(PLAIN, 20)
    module = layer_of(spec).eval()
    _, selection = apply(module, heads, stream)
    scores = {key: value.item() for key, value in slow_scores(spec, module.gate, heads, PLAIN).items()}
    for t in range(20):
        for n in range(spec.shape(PLAIN).choosers):
            past = {m: scores[t, n, m] for m in range(t // BLOCK)}
            order = sorted(past, key=lambda m: -past[m])
            weights = {m: math.exp(x) / sum(map(math.exp, past.values())) for m, x in past.items()}
            want = {
                "budget": order[: max(1, getattr(rule, "tokens", 0) // BLOCK) - 1],
                "threshold": [m for m in past if weights[m] >= rule.share] if rule.kind == "threshold" else [],
                "density": order[: math.ceil(getattr(rule, "share", 1) * (t // BLOCK + 1)) - 1],
            }[rule.kind]
            got = [m for m in selection.blocks_THJ[t, n].tolist() if m >= 0]
            assert got[0] == t // BLOCK and set(got[1:]) == set(want) and len(got) == len(set(got))


def test_ties_take_the_lower_block():
    """T24: with equal keys all scores are equal without a position code."""
    kv = PLAIN.replace(position=NoPE())
    heads, stream = step(kv, 14)
    ones_TGK = torch.ones_like(heads.k_TGK)
    even = Heads(heads.q_THK, ones_TGK, heads.v_TGV, heads.plain_q_THK, ones_TGK)
    o_THV, selection = apply(layer_of(SeerR(block=3, width=6, rule=Budget(tokens=9)), kv).eval(), even, stream)
    assert selection.blocks_THJ[13].tolist() == [[4, 0, 1]] * 2
    assert o_THV.isfinite().all()


def test_the_heads_of_a_group_choose_as_one_and_those_of_a_prompt_apart():
    heads, stream = step(PLAIN, 20)
    per_group = apply(layer_of(GATES[4]).eval(), heads, stream)[1].blocks_THJ
    per_head = apply(layer_of(GATES[0]).eval(), heads, stream)[1].blocks_THJ
    assert per_group.shape[1] == 2 and per_head.shape[1] == 4
    assert (per_head[:, 0] != per_head[:, 1]).any()


POOLED = Seer(block=4, rule=Budget(tokens=8))


def test_pooled_queries_are_causal_between_blocks_only():
    """The named exemption: a choice depends on later tokens of its own block, on none of a later one."""
    model, tokens_T = built(POOLED, layers=1), random_tokens(40)
    inside = 0.0
    for changed in (15, 18, 22, 27):
        for other in range(1, 23, 4):
            other_T = tokens_T.clone()
            other_T[changed] = (other_T[changed] + other) % 23
            moved_T = (run(model, other_T, [40]) - run(model, tokens_T, [40])).abs().amax(-1)
            assert moved_T[: changed // 4 * 4].max() < 1e-12
            inside = max(inside, moved_T[changed // 4 * 4 : changed].amax().item() if changed % 4 else 0.0)
    assert inside > 1e-6


def test_the_last_two_rows_of_a_prompt_and_every_step_after_it_read_everything():
    heads, stream = step(PLAIN, 22)
    _, selection = apply(layer_of(POOLED).eval(), heads, stream)
    counts = (selection.blocks_THJ >= 0).sum(-1)
    assert (counts[:16] <= 2).all() and (counts[16:20] == 5).all() and (counts[20:] == 6).all()
    model, tokens_T = built(POOLED, layers=1), random_tokens(22)
    dense = built(Full(), layers=1).spec.build().double()
    dense.load_state_dict({name: x for name, x in model.state_dict().items() if ".pattern." not in name})
    close(chunked(model, tokens_T, [19, 1, 1, 1])[19:], run(dense, tokens_T, [22])[19:])


def test_gate_rows_of_finished_blocks_never_change():
    """T11: and a block that is not finished has none."""
    model, tokens_T = built(GATES[4]), random_tokens(20)
    memory, before = model.memory(1), torch.empty(0, 2, 6)
    for at in range(20):
        run(model, tokens_T[at : at + 1], [1], memory)
        state = memory.layers[0]
        assert isinstance(state, JointState)
        gates = state.part("gates", BlockState)
        assert gates.held == [(at + 1) // BLOCK]
        rows = gates.buffer[0, : gates.held[0]].clone()
        assert torch.equal(rows[: len(before)], before.to(rows.dtype))
        before = rows


@pytest.mark.parametrize(
    ("spec", "kv", "layers", "millions"),
    [
        (Seer(block=64, rule=RULE), GQA(heads=32, kv_heads=8, head_dim=128), 32, 50.3),  # Llama-3.1-8B
        (SeerR(block=64, rule=RULE), GQA(heads=32, kv_heads=8, head_dim=128), 36, 33.0),  # Qwen3-8B
        (SeerR(block=64, rule=RULE), GQA(heads=40, kv_heads=8, head_dim=128), 40, 41.9),  # Qwen3-14B: 83.9 MB in bf16
        (SeerR(block=64, rule=RULE), GQA(heads=40, kv_heads=8, head_dim=128), 48, 50.3),  # its 48-layer kin: 100.7 MB
    ],
)
def test_gates_have_the_published_sizes(spec, kv, layers, millions):
    """Spec sparse-attention 8 and 18."""
    assert round(layers * spec.cost(4096, kv, At(1)).params / 1e6, 1) == millions
    with torch.device("meta"):
        module = spec.build(4096, kv, None)
    assert sum(p.numel() for p in module.parameters()) == spec.cost(4096, kv, At(1)).params


def test_gate_rows_cost_little_beside_the_keys():
    """Fp32 rows of a block of 64: 1.6 % of its keys and values in bf16 (published: under 1 %, with rows in bf16)."""
    kv = GQA(heads=32, kv_heads=8, head_dim=128)
    state = SeerR(block=64, rule=RULE).state(kv)
    parts = dict(state.parts)
    share = parts["gates"].nbytes(2**15, 2) / parts["keys"].nbytes(2**15, 2)
    assert share == pytest.approx(1 / 64)


@pytest.mark.parametrize("tokens", [1, 3, 7, 18, 23])
@pytest.mark.parametrize("spec", params([*GATES, GATES[4].replace(rule=Density(share=0.5))]))
def test_cost_counts_keys_read_and_blocks_scored(spec, tokens):
    heads, stream = step(PLAIN, tokens)
    _, selection = apply(layer_of(spec).eval(), heads, stream)
    pairs = 0
    for t in range(tokens):
        blocks = {m for m in selection.blocks_THJ[t, 0].tolist() if m >= 0}
        pairs += sum(s // BLOCK in blocks for s in range(t + 1))
    shape, rows = spec.shape(PLAIN), spec.rows
    scored = sum(t // BLOCK for t in range(tokens)) / rows
    gate = (shape.query_params / rows + shape.key_params / BLOCK) * tokens + shape.choosers * shape.width * scored
    cost = spec.cost(32, PLAIN, At(tokens, 8))
    assert cost.flops * tokens == pytest.approx(2 * (4 * 16 * pairs + gate))


def test_rows_pool_what_is_there():
    """A block of queries that a step cuts has the mean of its tokens in the step."""
    from sextant.axes.attention.base import Sequence

    q = torch.arange(7, dtype=torch.float64)[:, None, None]
    rows = Rows.of(Sequence(0, slice(0, 7), q, torch.zeros(12, 1, 1), torch.zeros(12, 1, 1)), 4, 4)
    assert rows.place_N.tolist() == [4, 8] and rows.mean(q).flatten().tolist() == [1.0, 4.5]
    assert rows.largest(q).flatten().tolist() == [2.0, 6.0] and rows.count_N.tolist() == [3, 4]


def test_an_odd_rotary_width_is_refused():
    layer = Layer(attention=SeerR(block=4, width=5, rule=RULE), kv=PLAIN.replace(position=RoPE()), feed_forward=DENSE)
    with pytest.raises(UsageError, match=r"odd number of channels or none: model\.layers\[0\]\.attention\.width"):
        check(model_spec(layer))
