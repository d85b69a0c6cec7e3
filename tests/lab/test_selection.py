"""What a report measures, held to loops over the definition, and the findings it was made for (L9, L16, T19, T21)."""

from __future__ import annotations

import math

import pytest
import torch
from cases import MOE, PLAIN, built, close, model_spec, params, random_tokens

from sextant.axes.attention import TABLE as ATTENTION
from sextant.axes.attention import Full, Mixer, MoBA, Selection
from sextant.axes.attention.base import SelectingPattern
from sextant.axes.capacity import Dense
from sextant.axes.kv import GQA, MLA
from sextant.axes.kv.base import Heads
from sextant.core.stream import Stream
from sextant.data.loader import Batch
from sextant.kernels.attention import Scores
from sextant.kernels.loss import IGNORE
from sextant.lab.inside import inspect, last_only, write
from sextant.lab.selection import Seen, block_mass, distinct, gini, judge, look, participation
from sextant.model.spec import Layer, ModelSpec, stack

BLOCK, T = 4, 27
SPARSE = MoBA(block=BLOCK, top_k=2)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(lengths: list[int], attention: MoBA = SPARSE, k_scale: float = 1.0) -> Seen:
    """One layer over random queries and keys."""
    tokens = sum(lengths)
    heads = Heads(drawn(tokens, 4, 8), k_scale * drawn(tokens, 2, 8, seed=1), drawn(tokens, 2, 8, seed=2))
    stream, scores = Stream.of_lengths(lengths), Scores(0.5)
    module = attention.build(16, GQA(heads=4, kv_heads=2, head_dim=8), model_spec(Layer(kv=PLAIN, feed_forward=MOE)))
    _, selection = module(heads, heads.q_THK[:, 0], stream, scores, None)
    return Seen(0, "moba", 2, heads, stream, scores, selection)


def slow_facts(one: Seen, lengths: list[int]) -> dict[str, float]:
    """Union, mass and recall from the definitions, query by query."""
    union, mass, best, load, at = [], [], [], {}, 0
    for length in lengths:
        for t in range(length):
            current, row = t // BLOCK, at + t
            chosen = [{int(n) for n in blocks if n >= 0} for blocks in one.selection.blocks_THJ[row]]
            for blocks in chosen:
                for n in blocks - {current}:
                    load[n] = load.get(n, 0) + 1
            if all(len(blocks) > current for blocks in chosen):
                continue
            for g in range(2):
                union.append(len((chosen[2 * g] | chosen[2 * g + 1]) - {current}))
            for h, blocks in enumerate(chosen):
                weight = (one.heads.k_TGK[at : row + 1, h // 2] @ one.heads.q_THK[row, h] * 0.5).softmax(0)
                of_block = [float(weight[n * BLOCK : (n + 1) * BLOCK].sum()) for n in range(current + 1)]
                mass.append(sum(of_block[n] for n in blocks))
                best.append(of_block[current] + sum(sorted(of_block[:current], reverse=True)[: len(blocks) - 1]))
        at += length
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return {"union": mean(union), "mass": mean(mass), "recall": mean(mass) / mean(best), "load": load}


@pytest.mark.parametrize("lengths", [[T], [T, 3, 19], [9, 13, 22]])
def test_union_mass_recall_and_load_are_their_definitions(lengths):
    one = seen(lengths)
    found, want = judge(one), slow_facts(one, lengths)
    assert found.union == pytest.approx(want["union"])
    assert found.mass == pytest.approx(want["mass"], rel=1e-5)
    assert found.recall == pytest.approx(want["recall"], rel=1e-5) and found.recall < 1
    total = sum(want["load"].values())
    close(torch.tensor(found.load_M), torch.tensor([want["load"].get(n, 0) / total for n in range(len(found.load_M))]))
    assert sum(found.chance_M) == pytest.approx(1)


def test_union_by_chance_is_met_by_noise():
    """Queries that have nothing to do with the keys choose evenly: U is what spec 1.5 expects."""
    found = judge(seen(8 * [128], SPARSE.replace(top_k=4), k_scale=1.0))
    assert found.union == pytest.approx(found.union_by_chance, rel=0.05)
    assert found.union < 2 * found.read
    assert found.queries == 8 * (128 - 4 * BLOCK) and found.read == pytest.approx(3)


def test_choices_of_the_heaviest_blocks_have_recall_1_and_those_of_the_lightest_do_not():
    one = seen([64])
    mass_THM = block_mass(one.heads.q_THK, one.heads.k_TGK, 0.5, BLOCK)
    assert torch.allclose(mass_THM.sum(2), torch.ones(64, 4))
    current_T = one.current_T[:, None, None].expand(-1, 4, 1)
    past_THM = torch.arange(16) < current_T
    best = mass_THM.masked_fill(~past_THM, -1).topk(2).indices
    worst = mass_THM.masked_fill(~past_THM, 9).topk(2, largest=False).indices

    def with_choice(blocks_THJ: torch.Tensor) -> Seen:
        allowed = blocks_THJ.where(blocks_THJ < current_T, -1)
        return Seen(0, "x", 2, one.heads, one.stream, one.scores, Selection(torch.cat([current_T, allowed], 2), BLOCK))

    assert judge(with_choice(best)).recall == pytest.approx(1, abs=1e-6)
    assert judge(with_choice(worst)).recall < 0.5


def test_a_layer_that_reads_everything_leaves_no_query_to_ask():
    found = judge(seen([12], SPARSE.replace(top_k=3)))
    assert found.queries == 0 and math.isnan(found.mass) and math.isnan(found.recall)


def test_l9_a_sink_raises_the_alarm():
    """Keys of block 0 that all queries like: chosen by nearly all."""
    one = seen([128])
    q_THK = one.heads.q_THK.abs()
    k_TGK = one.heads.k_TGK.clone()
    k_TGK[:BLOCK] = 3.0
    module = SPARSE.build(16, GQA(heads=4, kv_heads=2, head_dim=8), model_spec(Layer(kv=PLAIN, feed_forward=MOE)))
    heads = Heads(q_THK, k_TGK, one.heads.v_TGV)
    _, selection = module(heads, q_THK[:, 0], one.stream, one.scores, None)
    found = judge(Seen(0, "moba", 2, heads, one.stream, one.scores, selection))
    assert found.alarm and found.sink > 4 and found.peak == found.sink > 2 * found.sink_by_chance
    assert found.gini > 0.9
    quiet = judge(one)
    assert quiet.sink == pytest.approx(quiet.sink_by_chance, rel=0.5) and quiet.gini < 0.7


@pytest.mark.parametrize(("shares", "want"), [([1, 1, 1, 1], 0), ([0, 0, 0, 8], 0.75), ([1, 3], 0.25), ([0, 0], 0)])
def test_gini(shares, want):
    assert gini(shares) == pytest.approx(want)


def test_distinct_counts_what_one_key_head_must_load():
    chosen_THM = torch.zeros(1, 4, 6, dtype=torch.bool)
    for head, blocks in enumerate(([0, 1], [1, 2], [5], [5])):
        chosen_THM[0, head, blocks] = True
    assert distinct(chosen_THM, 2).tolist() == [[3, 1]]
    assert distinct(chosen_THM, 1).tolist() == [[4]]
    assert distinct(chosen_THM[:, :1], 2).tolist() == [[2, 2]]  # one choice for all


def test_look_sees_every_selecting_layer_and_leaves_no_hook():
    """Also over latents, where a decoding step has one key head for all."""
    sparse = Layer(attention=SPARSE, kv=PLAIN, feed_forward=MOE)
    latents = sparse.replace(kv=MLA(heads=4, rank=6, nope_dim=6, rope_dim=4, v_dim=6))
    model = model_spec(sparse, sparse.replace(attention=Full()), latents).build(seed=0)
    choices, out = look(model, random_tokens(40), Stream.of_lengths([23, 17]))
    assert [choice.layer for choice in choices] == [0, 2] == list(out.selections)
    assert choices[1].union > choices[0].union  # four heads of one key head against two
    assert all(0 < choice.mass < 1 and choice.mass < choice.recall <= 1 for choice in choices)
    assert not any(module._forward_hooks for module in model.modules())
    whole = torch.tensor(choices[0].map_CM)
    assert torch.equal(whole.diagonal(), torch.ones(6, dtype=whole.dtype)) and (whole.triu(1) == 0).all()


CHOOSING = [row.examples[0] for row in ATTENTION if not issubclass(row.spec, Mixer)]


@pytest.mark.parametrize("attention", params(CHOOSING))
def test_every_pattern_that_chooses_can_be_looked_at(attention):
    """One record serves them all: choices per head, per group or for all, blocks of one token or of many."""
    choices, out = look(built(attention), random_tokens(50), Stream.of_lengths([27, 23]))
    assert [choice.layer for choice in choices] == list(out.selections)
    for choice in choices:
        assert 0 < choice.mass <= choice.recall <= 1 + 1e-6 and choice.read <= choice.union
        assert sum(choice.load_M) == pytest.approx(1) and choice.queries > 0
    assert bool(choices) == isinstance(attention, SelectingPattern)


# --- gradient -------------------------------------------------------------------------------------------------------


def test_participation_is_its_definition():
    model, tokens_T, targets_T = built(SPARSE), random_tokens(T), torch.full((T,), IGNORE)
    targets_T[-3:] = random_tokens(3, seed=1)
    found = participation(model, tokens_T, targets_T, Stream.of_lengths([T]))
    x_TD = model.embedding(tokens_T).detach().requires_grad_()
    hidden_TD, stream = x_TD, Stream.of_lengths([T])
    for code, rotary in model.rotaries.items():
        stream.turns[code] = rotary.turns(stream.positions_T, torch.float64)
    for block in model.blocks:
        hidden_TD = block(hidden_TD, stream)[0]
    loss = torch.nn.functional.cross_entropy(model.logits(model.norm(hidden_TD)), targets_T, reduction="sum")
    g_T = torch.autograd.grad(loss, x_TD)[0].norm(dim=1)[: T - 3]
    assert found[0] == pytest.approx(float(g_T.sum() ** 2 / (len(g_T) * g_T.square().sum())), rel=1e-9)
    assert len(found) == 2 and all(parameter.grad is None for parameter in model.parameters())


def test_participation_of_frozen_weights_and_of_packed_sequences():
    """A loaded model has no gradients of its own; sequences are judged apart and meaned."""
    model, tokens_T, targets_T = built(SPARSE).requires_grad_(False), random_tokens(30), torch.full((30,), IGNORE)
    targets_T[[13, 29]] = 3
    packed = participation(model, tokens_T, targets_T, Stream.of_lengths([14, 16]))
    apart = [
        participation(model, tokens_T[here], targets_T[here], Stream.of_lengths([n]))
        for here, n in ((slice(0, 14), 14), (slice(14, 30), 16))
    ]
    assert packed == pytest.approx([(a + b) / 2 for a, b in zip(*apart, strict=True)])
    model.requires_grad_(True)


def test_t21_few_scored_tokens_reach_more_of_the_prompt_through_a_full_last_layer():
    """L14 to L16: ten tokens carry loss; the last layer full spreads their gradient at its input, sparse does not."""

    def ratio(attention: list) -> float:
        kv = GQA(heads=4, kv_heads=2, head_dim=16)
        layers = stack(6, attention=attention, kv=kv, feed_forward=Dense(hidden=128))
        model = ModelSpec(name="t21", vocab=64, width=64, context=1024, layers=layers).build(seed=0)
        tokens_T, targets_T = random_tokens(1024, vocab=64), torch.full((1024,), IGNORE)
        targets_T[-10:] = random_tokens(10, seed=1, vocab=64)
        return participation(model, tokens_T, targets_T, Stream.of_lengths([1024]))[-1]

    sparse = MoBA(block=32, top_k=3)
    assert ratio(5 * [sparse] + [Full()]) > 0.95
    assert ratio(6 * [sparse]) < 0.9


# --- the report -----------------------------------------------------------------------------------------------------


def test_a_report_writes_what_it_found(tmp_path):
    model = model_spec(
        Layer(attention=SPARSE, kv=PLAIN, feed_forward=MOE), Layer(kv=PLAIN, feed_forward=MOE)
    ).build(seed=0)
    tokens_T = random_tokens(64)
    batch = Batch(tokens_T, tokens_T.roll(-1), Stream.of_lengths([32, 32]), (0, 1))
    found = inspect(model.train(), batch, scored=4)
    assert model.training and len(found.gradients) == 2 and set(found.experts) == {0, 1}
    assert sum(found.experts[0]) == 64 * 2
    written = {path.name: path for path in write(found, tmp_path / "new")}
    assert {"layers.csv", "load.csv", "choices.csv", "experts.csv"} <= set(written)
    assert all(path.stat().st_size for path in written.values())
    rows = written["layers.csv"].read_text().splitlines()
    assert rows[0].startswith("layer,attention,block,queries") and rows[2].startswith("1,full,,")
    shares = [float(line.split(",")[2]) for line in written["load.csv"].read_text().splitlines()[1:]]
    assert sum(shares) == pytest.approx(1)


def test_pictures_are_drawn_when_matplotlib_is_here(tmp_path):
    pytest.importorskip("matplotlib")
    model = model_spec(*3 * [Layer(attention=SPARSE, kv=PLAIN, feed_forward=MOE)]).build(seed=0)
    batch = Batch(random_tokens(40), random_tokens(40), Stream.of_lengths([40]), (0,))
    names = {path.name for path in write(inspect(model, batch, 4), tmp_path)}
    assert {"choices.png", "load.png", "experts.png", "gradient.png"} <= names


def test_only_the_last_tokens_of_each_sequence_are_scored():
    batch = Batch(random_tokens(9), random_tokens(9), Stream.of_lengths([2, 7]), (0, 1))
    assert (last_only(batch, 3) != IGNORE).tolist() == [True, True, False, False, False, False, True, True, True]
