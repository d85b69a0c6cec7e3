"""Static patterns: masks against definitions in plain numbers, counts against masks, every path against the dense
reference with gradients, and what is kept. Test ids T2, T9, T10, T14, T15 of the catalogue; T3 to T6 are the contract
suite's.
"""

import itertools

import pytest
import torch
from cases import DENSE, PLAIN, built, close, examples, model_spec, name, random_tokens, run
from torch import Tensor

from sextant.axes.attention import (
    TABLE,
    BigBird,
    BlockLocal,
    Dilated,
    Fixed,
    Full,
    LearnedSink,
    Longformer,
    MoA,
    MoBA,
    Strided,
    Window,
)
from sextant.axes.attention.bigbird import Blocks
from sextant.axes.attention.block_local import Block
from sextant.axes.attention.static import StaticPattern
from sextant.axes.kv import GQA
from sextant.core.cost import At
from sextant.core.state import Keys, RowSpec
from sextant.core.stream import Stream
from sextant.kernels.attention import Scores, Span, attend, attend_dense
from sextant.kernels.attention.selected import attend_selected
from sextant.kernels.attention.span import Tiled
from sextant.kernels.attention.tiles import occupied
from sextant.kernels.attention.topk import choose
from sextant.model.spec import Layer

STATIC = [example for example in examples(TABLE) if isinstance(example, StaticPattern)]
KV = GQA(heads=6, kv_heads=2, head_dim=4)
LARGER = [
    Dilated(window=5, dilation=3), Strided(stride=4), Strided(stride=5, heads="merged"), BlockLocal(block=7),
    Fixed(block=6, columns=2, subblocks="distinct"), Fixed(block=5, columns=2, heads="merged", subblocks="distinct"),
    Longformer(window=4, global_tokens=5, dilation=3, dilated=1), BigBird(block=3, window=2, global_blocks=2, random=3),
    MoA(alpha=(5, 0), beta=(0.0, 0.5), sinks=3, block=4),
]
REACHES = sorted({reach for pattern in STATIC + LARGER for reach in pattern.reaches(KV)}, key=repr)
by_reach = pytest.mark.parametrize("reach", REACHES, ids=str)


def mask(reach, tokens: int) -> Tensor:
    place = torch.arange(tokens)
    return reach.visible(place, place)


def seen(reach, query: int, tokens: int = 40) -> list[int]:
    return mask(reach, tokens)[query].nonzero()[:, 0].tolist()


def test_patterns_by_definition():
    """The keys of one query, counted by hand."""
    near, far = Strided(stride=4).reaches(KV)
    assert seen(near, 10) == [7, 8, 9, 10] and seen(far, 10) == [2, 6, 10]
    assert seen(Strided(stride=4, heads="merged").reaches(KV)[0], 10) == [2, 6, 7, 8, 9, 10]
    own, columns = Fixed(block=4, columns=2).reaches(KV)
    assert seen(own, 10) == [8, 9, 10] and seen(columns, 10) == [2, 3, 6, 7] and seen(columns, 3) == []
    first, second = Fixed(block=4, columns=2, heads="merged", subblocks="distinct").reaches(KV)
    assert seen(first, 9) == [2, 3, 6, 7, 8, 9] and seen(second, 9) == [0, 1, 4, 5, 8, 9]
    assert seen(BlockLocal(block=4).reaches(KV)[0], 10) == [8, 9, 10]
    assert seen(Dilated(window=3, dilation=4).span, 10) == [2, 6, 10]
    plain, gaps = Longformer(window=3, global_tokens=2, dilation=3, dilated=1).reaches(KV)
    assert seen(plain, 10) == [0, 1, 8, 9, 10] and seen(gaps, 10) == [0, 1, 4, 7, 10]
    assert seen(BigBird(block=2, window=2, global_blocks=1, random=0).reaches(KV)[0], 10) == [0, 1, 8, 9, 10]
    short, long = MoA(alpha=(4, 0), beta=(0.0, 0.5), sinks=1, block=2).reaches(KV)
    assert seen(short, 20) == [0, 18, 19, 20] and seen(long, 20) == [0, *range(10, 21)]
    fixed = MoA(alpha=(4, 0), beta=(0.0, 0.5), sinks=1, block=2, length=16).reaches(KV)
    assert fixed == (Span(3, 1), Span(7, 1))


@by_reach
def test_counts_are_those_of_the_mask(reach):
    for tokens in (1, 2, 3, 5, 12, 41):
        seen_TS = mask(reach, tokens)
        assert reach.keys(torch.arange(tokens)).tolist() == seen_TS.sum(1).tolist()
        assert reach.mean_keys(tokens) == pytest.approx(float(seen_TS.sum()) / tokens, rel=1e-12)


@by_reach
def test_masks_are_causal_and_pass_over_empty_slots(reach):
    places_S = torch.tensor([-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, -1])
    seen_TS = reach.visible(torch.arange(10), places_S)
    assert torch.equal(seen_TS[:, 1:-1], mask(reach, 10)) and not seen_TS[:, [0, -1]].any()
    assert not mask(reach, 30).triu(1).any()


@by_reach
def test_what_is_kept_holds_all_that_later_tokens_read(reach):
    """A ring of the declared width is enough, and one row fewer would not be."""
    window, sinks = reach.kept
    age_TS = torch.arange(50)[:, None] - torch.arange(50)
    read_TS = mask(reach, 50)
    if window is not None:
        behind_TS = read_TS & (torch.arange(50) >= sinks)
        assert age_TS[behind_TS].max() == min(window, 50) - 1


@by_reach
def test_no_tile_with_a_visible_pair_is_missed(reach):
    tiles = (4, 7) if reach.tile == 128 else (reach.tile,)
    for (first, stop), tile in itertools.product([(0, 1), (0, 23), (9, 23), (22, 23)], tiles):
        claimed = Tiled(reach).tiles(first, stop, tile)
        truth = occupied(Tiled(reach), first, stop, tile)
        assert claimed.shape == truth.shape
        assert not (truth & ~claimed).any()


@pytest.mark.parametrize("reach", [Span(5), Span(3, 2), Block(4), Blocks(4, 1, 1, 1, 3)], ids=str)
def test_tiles_are_few(reach):
    """The bound is worth having: it is not all of the causal triangle."""
    claimed = Tiled(reach).tiles(0, 80, 4)
    assert claimed.sum() < 0.4 * claimed.numel() / 2


def rows(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (tokens, 6, 8), (tokens, 2, 8), (tokens, 2, 5)
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)  # type: ignore[return-value]


@by_reach
@pytest.mark.parametrize("with_slopes", [False, True], ids=["dot", "alibi"])
@pytest.mark.parametrize("lengths", [[9, 9], [1, 0, 23, 5, 5]], ids=str)
def test_t2_paths_equal_the_dense_reference(reach, lengths, with_slopes):
    """Outputs and gradients, packed; queries that read nothing give 0 and no NaN."""
    q, k, v = rows(sum(lengths))
    how = Scores(0.4, torch.rand(6, dtype=torch.float64) if with_slopes else None)
    got = attend(q, Keys(k, v), Stream.of_lengths(lengths), reach, how)
    pieces = []
    for one in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        place = torch.arange(len(one[0]))
        pieces.append(attend_dense(*one, mask(reach, len(one[0])), how, place[:, None] - place)[0])
    want, weight = torch.cat(pieces), torch.randn(sum(lengths), 6, 5, dtype=torch.float64)
    close(got, want)
    got_grads = torch.autograd.grad((got * weight).sum(), (q, k, v))
    for mine, theirs in zip(got_grads, torch.autograd.grad((want * weight).sum(), (q, k, v)), strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("pattern", STATIC, ids=name)
def test_model_reads_what_its_masks_say(pattern):
    """Through a whole layer: every KV group by its own mask, heads back in their places (T14)."""
    model, tokens = built(pattern, layers=1), 13
    stream = Stream.of_lengths([tokens])
    x_TD = torch.randn(tokens, 10, dtype=torch.float64)
    attention = model.blocks[0].attention
    model(random_tokens(1), Stream.of_lengths([1]))
    for code, rotary in model.rotaries.items():
        stream.turns[code] = rotary.turns(stream.positions_T, torch.float64)
    heads = attention.kv.project(x_TD, stream)
    got, _ = attention.pattern(heads, x_TD, stream, attention.kv.scores, None)
    mask_HTS = torch.stack([mask(reach, tokens) for reach in pattern.reaches(PLAIN)]).repeat_interleave(2, dim=0)
    want, lse_HT = attend_dense(heads.q_THK, heads.k_TGK, heads.v_TGV, mask_HTS, attention.kv.scores)
    if isinstance(pattern, LearnedSink):
        want = want * torch.sigmoid(lse_HT - attention.pattern.sinks_H[:, None]).t()[..., None]
    close(got, want)


def test_t14_groups_move_with_their_spans():
    """Two KV heads with their queries and spans change places, and so do the outputs."""
    q, k, v = rows(17)
    pattern = MoA(alpha=(2, 7), beta=(0.1, 0.0), sinks=1, block=1)
    turned = pattern.replace(alpha=(7, 2), beta=(0.0, 0.1))
    stream, how = Stream.of_lengths([17]), Scores(0.5)

    def through(pattern: MoA, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        module = pattern.build(8, KV, None)
        return module._by_group(q, {kept: Keys(k, v) for kept in module.stores}, stream, how)

    swap = [3, 4, 5, 0, 1, 2]
    got = through(turned, q[:, swap], k.flip(1), v.flip(1))
    assert torch.equal(got[:, swap], through(pattern, q, k, v))
    assert not torch.allclose(through(turned, q, k, v), through(pattern, q, k, v))


@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize("window", [1, 2, 5])
def test_t15_windows_and_sinks_are_constant_gates(window, sinks):
    """A selector that likes the newest blocks best, or the first ones most, with blocks of one token."""
    q, k, v = rows(19)
    liking_M = torch.arange(18, dtype=torch.float64)
    liking_M[:sinks] = 100 - torch.arange(sinks)
    far_T = (torch.arange(19) - window + 1).clamp(min=0, max=sinks)  # sinks that lie behind the window
    want = attend(q, Keys(k, v), Stream.of_lengths([19]), Span(window, sinks), Scores(0.5))
    for t in range(19):
        top_k = window + int(far_T[t]) if sinks else window
        blocks_THJ = choose(liking_M.expand(1, 6, -1).clone(), t, 1, top_k)
        got, _ = attend_selected(q[t : t + 1], k[: t + 1], v[: t + 1], blocks_THJ, 1, Scores(0.5))
        close(got, want[t : t + 1])


@pytest.mark.parametrize("block", [2, 3, 5])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_t15_block_windows_are_a_gate_that_likes_the_newest(window, block):
    q, k, v = rows(23)
    newest_THM = torch.arange(23 // block, dtype=torch.float64).expand(23, 6, -1)
    got, _ = attend_selected(q, k, v, choose(newest_THM, 0, block, window), block, Scores(0.5))
    close(got, attend(q, Keys(k, v), Stream.of_lengths([23]), Blocks(block, window, 0, 0, 0), Scores(0.5)))


def test_t15_random_blocks_are_a_gate_that_likes_the_drawn():
    q, k, v = rows(40)
    reach = BigBird(block=4, window=2, global_blocks=1, random=2).reaches(KV)[1]
    read_TM = mask(reach, 40)[:, ::4]
    likes_THM = torch.where(read_TM, 1.0, 0.0)[:, None].expand(-1, 6, -1).double()
    for t in range(40):
        count = int(read_TM[t].sum())
        blocks_THJ = choose(likes_THM[t : t + 1, :, : t // 4], t, 4, count)
        got, _ = attend_selected(q[t : t + 1], k[: t + 1], v[: t + 1], blocks_THJ, 4, Scores(0.5))
        close(got, attend(q, Keys(k, v), Stream.of_lengths([40]), reach, Scores(0.5))[t : t + 1])


def test_t9_block_local_is_moba_of_the_current_block():
    local, moba, tokens_T = built(BlockLocal(block=4)), built(MoBA(block=4, top_k=1)), random_tokens(19)
    close(run(local, tokens_T, [19]), run(moba, tokens_T, [19]))
    assert local.state_dict().keys() == moba.state_dict().keys() == built(Full()).state_dict().keys()


@pytest.mark.parametrize("pattern", [Dilated(window=3, dilation=2), Strided(stride=3), BlockLocal(block=4)], ids=name)
def test_t10_sparse_really_is_sparse(pattern):
    tokens_T = random_tokens(19)
    assert (run(built(pattern), tokens_T, [19]) - run(built(Full()), tokens_T, [19])).abs().max() > 1e-3


@pytest.mark.parametrize("random", [1, 2, 4])
def test_draws_are_distinct_past_and_of_the_seed_alone(random):
    blocks_T = torch.arange(60)
    draws = [torch.stack(Blocks(4, 3, 2, random, seed).drawn(blocks_T)) for seed in (0, 1)]
    assert not torch.equal(*draws)
    assert torch.equal(torch.stack(Blocks(4, 3, 2, random, 0).drawn(blocks_T[37:41])), draws[0][:, 37:41])
    for block, drawn in enumerate(draws[0].t().tolist()):
        real = [number for number in drawn if number >= 0]
        assert len(set(real)) == len(real) == min(random, max(0, block - 4))
        assert all(2 <= number <= block - 3 for number in real)


def test_draws_are_even():
    """Each of 30 candidates is drawn about as often as any other, over 1,500 seeds: within 5 standard deviations."""
    draws = [torch.stack(Blocks(4, 3, 2, 3, seed).drawn(torch.tensor([34]))).flatten() for seed in range(1500)]
    counts = torch.cat(draws).bincount(minlength=32)[2:]
    assert len(counts) == 30 and ((counts - 150).abs() < 5 * 150**0.5).all()


def test_layers_and_groups_draw_apart():
    masks = [mask(reach, 200) for seed in range(3) for reach in BigBird(block=4, seed=seed).reaches(KV)]
    assert len({tuple(one.flatten().tolist()) for one in masks}) == 6


def test_short_groups_keep_short_rings():
    """Spans of 3 and 40 cost 43 rows of one head each, not 40 of two; the step reads what the groups see."""
    kv = PLAIN.replace(kv_heads=2)
    pattern = MoA(alpha=(3, 40), beta=(0.0, 0.0), sinks=1, block=1, length=100)
    assert pattern.state(kv).nbytes(1000, 2) == (3 + 40) * 16 * 2
    assert Strided(stride=8).state(kv).nbytes(1000, 2) == (8 + 1000) * 16 * 2
    cost = Strided(stride=8).cost(10, kv, At(1000, 2))
    assert cost.read_bytes == (8 + 125) * 16 * 2
    assert isinstance(Strided(stride=8, heads="merged").state(kv), RowSpec)


@pytest.mark.parametrize("pattern", STATIC + LARGER, ids=name)
def test_costs_are_those_of_the_masks(pattern):
    for tokens in (1, 7, 24):
        masks = [mask(reach, tokens) for reach in pattern.reaches(PLAIN)]
        cost = pattern.cost(10, PLAIN, At(tokens, 4))
        assert cost.flops * tokens == pytest.approx(2 * 2 * (8 + 8) * float(sum(one.sum() for one in masks)), rel=1e-12)
        assert cost.read_bytes == sum(int(one[-1].sum()) for one in masks) * 16 * 4
        assert cost.read_bytes <= cost.state_bytes


def test_learned_sink_is_one_more_key_of_no_value():
    q, k, v = rows(9)
    sinks_H = torch.randn(6, dtype=torch.float64, requires_grad=True)
    module = LearnedSink(window=4).build(8, KV, None).double()
    module.sinks_H.data.copy_(sinks_H.data)
    got = module._by_group(q, {(4, 0): Keys(k, v)}, Stream.of_lengths([9]), Scores(0.5))
    logits_HTS = torch.einsum("thk,shk->hts", q, k.repeat_interleave(3, 1)) * 0.5
    logits_HTS = logits_HTS.masked_fill(~mask(Span(4), 9), -torch.inf)
    with_sink = torch.cat([logits_HTS, sinks_H[:, None, None].expand(-1, 9, 1)], dim=-1)
    want = torch.einsum("hts,shv->thv", with_sink.softmax(-1)[..., :-1], v.repeat_interleave(3, 1))
    close(got, want)
    mine = torch.autograd.grad(got.square().sum(), (q, k, v, module.sinks_H))
    for a, b in zip(mine, torch.autograd.grad(want.square().sum(), (q, k, v, sinks_H)), strict=True):
        close(a, b)
    assert mine[3].abs().min() > 0


@pytest.mark.parametrize("pattern, plain", [(LearnedSink(), Full()), (LearnedSink(window=4), Window(window=4))])
def test_a_sink_that_nobody_looks_at_changes_nothing(pattern, plain):
    layer = Layer.parse({"attention": pattern, "kv": PLAIN, "feed_forward": DENSE})
    model, tokens_T = model_spec(layer, layer).build(seed=3).double().eval(), random_tokens(11)
    weights = built(plain).state_dict()
    sinks = {key: torch.full_like(value, -60.0) for key, value in model.state_dict().items() if "sinks_H" in key}
    assert len(sinks) == 2
    model.load_state_dict({**weights, **sinks})
    close(run(model, tokens_T, [11]), run(built(plain), tokens_T, [11]))


def test_patterns_with_nothing_to_leave_out_are_full_attention():
    """T1: strides, windows and spans that cover everything."""
    full, tokens_T = run(built(Full()), random_tokens(11), [11]), random_tokens(11)
    for pattern in (
        Strided(stride=1, heads="merged"), Dilated(window=11, dilation=1), BlockLocal(block=11),
        Fixed(block=11, columns=3, heads="merged"), Fixed(block=2, columns=2, heads="merged"),
        Longformer(window=2, global_tokens=9), BigBird(block=1, window=3, global_blocks=4, random=4),
        MoA(alpha=(0, 0), beta=(1.0, 1.5), sinks=0, block=1),
    ):
        close(run(built(pattern), tokens_T, [11]), full)
