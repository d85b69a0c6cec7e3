"""Prediction modules: their wiring, what they share, what they must not touch, and drafts (spec deepseek-v3, 3.5)."""

import pytest
import torch
from cases import DENSE, MOE, VOCAB, close, model_spec, random_tokens
from torch import Tensor

from sextant.axes.attention import Full, Window
from sextant.axes.kv import GQA, MLA
from sextant.axes.numerics import BF16
from sextant.core.cost import At
from sextant.core.errors import UsageError
from sextant.core.stream import Stream
from sextant.kernels.loss import IGNORE, summed_loss
from sextant.model.checks import check
from sextant.model.mtp import MTP, LossWeight, without_last
from sextant.model.spec import Layer, ModelSpec
from sextant.model.switch import attending, switch
from sextant.model.transformer import Output, Transformer

HEADS = GQA(heads=2, kv_heads=1, head_dim=6)
LAYERS = (Layer(kv=HEADS, feed_forward=DENSE), Layer(kv=HEADS, feed_forward=MOE))
CHOICES = [
    MTP(order="embedding_first", hidden="post_norm"), MTP(order="embedding_first", hidden="pre_norm"),
    MTP(order="hidden_first", hidden="post_norm"), MTP(order="hidden_first", hidden="pre_norm"),
]
LENGTHS = [7, 1, 4, 2, 3]


def build(mtp: MTP | None = MTP(depth=2), **fields: object) -> Transformer:  # noqa: B008 - frozen
    model = model_spec(*LAYERS, mtp=mtp, **fields).build(seed=4).double()
    with torch.no_grad():  # gains of one would hide a norm in the wrong place
        for name, parameter in model.named_parameters():
            if name.endswith("gain"):
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return model


def ahead(model: Transformer, tokens_T: Tensor, lengths: list[int]) -> Output:
    return model(tokens_T, Stream.of_lengths(lengths), ahead=True)


def losses(model: Transformer, tokens_T: Tensor, targets_T: Tensor, lengths: list[int]) -> tuple[Tensor, list[Tensor]]:
    out = ahead(model, tokens_T, lengths)
    return summed_loss(out.hidden_TD, model.head_PD, targets_T), [
        summed_loss(one.out.hidden_TD, model.head_PD, targets_T[one.read_T]) for one in out.ahead
    ]


# --- the equations ---------------------------------------------------------------------------------------------------


def by_the_paper(model: Transformer, tokens: list[int]) -> list[Tensor]:
    """Rows of every module for one sequence, row by row as section 3.1 writes them; the block is the model's own."""
    mtp, tokens_T = model.spec.mtp, torch.tensor(tokens)
    out = model(tokens_T, Stream.of_lengths([len(tokens)]))
    rows_TD, found = out.onward_TD, []
    for k, module in enumerate(model.mtp, start=1):
        entering = []
        for i in range(len(tokens) - k):
            embedded_D = module.embedding_norm(model.embedding.weight[tokens[i + k]] * model.spec.embedding_scale)
            hidden_D = module.hidden_norm(rows_TD[i])
            pair = (embedded_D, hidden_D) if mtp.order == "embedding_first" else (hidden_D, embedded_D)
            entering.append(module.project.weight @ torch.cat(pair))
        if not entering:
            break
        stream = Stream.of_lengths([len(entering)])
        model._turn(stream)
        x_TD = module.block(torch.stack(entering), stream)[0]
        found.append(module.norm(x_TD))
        rows_TD = found[-1] if mtp.hidden == "post_norm" else x_TD
    return found


@pytest.mark.parametrize("mtp", CHOICES, ids=lambda mtp: f"{mtp.order}-{mtp.hidden}")
def test_modules_follow_the_equations_in_every_sequence(mtp):
    """MTP-7, and packed = separate: each sequence of a stream is what it is alone; short ones give fewer rows."""
    model, tokens_T = build(mtp.replace(depth=3), embedding_scale=1.7), random_tokens(sum(LENGTHS))
    out, read, starts = ahead(model, tokens_T, LENGTHS), [[], [], []], [0]
    alone = []
    for length in LENGTHS:
        own = tokens_T[starts[-1] : starts[-1] + length].tolist()
        alone.append(by_the_paper(model, own))
        for k in range(3):
            read[k] += range(starts[-1] + k + 1, starts[-1] + length)
        starts.append(starts[-1] + length)
    for k, one in enumerate(out.ahead):
        close(one.out.hidden_TD, torch.cat([rows[k] for rows in alone if len(rows) > k]), 1e-10)
        assert one.read_T.tolist() == read[k]
        assert one.stream.lengths == [length - k - 1 for length in LENGTHS if length > k + 1]


def test_before_and_after_the_norm_differ():
    """MTP-6's silent cousin: the choice must show, or nobody would notice the wrong one."""
    tokens_T = random_tokens(6)
    rows = [ahead(build(mtp), tokens_T, [6]).ahead[0].out.hidden_TD for mtp in CHOICES]
    for i, one in enumerate(rows):
        for other in rows[:i]:
            assert not torch.allclose(one, other)


@pytest.mark.parametrize("lengths", [[5, 5, 5], [1, 1], [0, 3, 0, 1, 4, 0], [0], [6]], ids=str)
def test_streams_lose_the_last_token_of_each_sequence(lengths):
    stream, rows_T = without_last(Stream.of_lengths(lengths))
    starts = [sum(lengths[:b]) for b in range(len(lengths))]
    expected = [(start + i, i) for start, length in zip(starts, lengths, strict=True) for i in range(length - 1)]
    assert list(zip(rows_T.tolist(), stream.positions_T.tolist(), strict=True)) == expected
    left = [length - 1 for length in lengths if length > 1]
    assert stream.lengths == stream.cu_seqlens.diff().tolist() == left
    assert stream.rows == (len(left) if len(set(left)) == 1 else None)
    assert stream.max_len == max(left, default=0)


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1]], ids=str)
def test_single_tokens_leave_nothing_to_predict_from(lengths):
    model = build()
    out = ahead(model, random_tokens(len(lengths)), lengths)
    assert out.ahead == () and out.hidden_TD.shape[0] == len(lengths)


def test_a_row_depends_on_the_next_token_and_on_no_later_one():
    """MTP-2: in [a, b, c, d, e] position 0 of module 1 is trained on c; token j reaches rows i with i + k >= j."""
    model, tokens_T = build(), random_tokens(9)
    before = ahead(model, tokens_T, [9]).ahead
    targets_T = torch.cat([tokens_T[1:], torch.tensor([3])])
    assert targets_T[before[0].read_T].tolist() == [*tokens_T[2:].tolist(), 3]
    assert targets_T[before[1].read_T].tolist() == [*tokens_T[3:].tolist(), 3]
    for j in range(9):
        changed_T = tokens_T.clone()
        changed_T[j] = (changed_T[j] + 1) % VOCAB
        for k, one in enumerate(ahead(model, changed_T, [9]).ahead, start=1):
            moved = (one.out.hidden_TD - before[k - 1].out.hidden_TD).abs().amax(-1) > 1e-12
            assert moved.tolist() == [i + k >= j for i in range(9 - k)]


def test_no_prediction_crosses_the_end_of_a_document():
    """MTP-8: what the stream keeps apart, the modules keep apart; the last target of a sequence is that of the main
    model's last row, and no target is used across an end.
    """
    model, tokens_T = build(), random_tokens(11)
    targets_T = tokens_T.roll(-1)
    targets_T[[3, 10]] = IGNORE
    _, both = losses(model, tokens_T, targets_T, [4, 7])
    apart = [losses(model, tokens_T[a:b], targets_T[a:b], [b - a])[1] for a, b in ((0, 4), (4, 11))]
    for k in range(2):
        close(both[k], apart[0][k] + apart[1][k], 1e-10)


# --- what is shared, and what is left alone --------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_are_the_same_parameters_and_gradients_add(tied):
    """MTP-1."""
    model, tokens_T = build(tied=tied), random_tokens(12)
    names = [name for name, _ in model.named_parameters()]
    assert sum(p.shape == (VOCAB, model.spec.width) for p in model.parameters()) == (1 if tied else 2)
    assert not [name for name in names if name.startswith("mtp") and ("embedding.weight" in name or "head" in name)]
    shared = [model.embedding.weight] if tied else [model.embedding.weight, model.head.weight]
    main, modules = losses(model, tokens_T, tokens_T.roll(-1), [12])
    one = torch.autograd.grad(main, shared, retain_graph=True)
    two = torch.autograd.grad(sum(modules), shared, retain_graph=True)
    for whole, a, b in zip(torch.autograd.grad(main + sum(modules), shared), one, two, strict=True):
        close(whole, a + b, 1e-10)
        assert a.norm() > 1e-3 and b.norm() > 1e-3


def test_the_model_without_modules_is_the_same_model():
    """MTP-4: parameters from the same seed, logits bit for bit, with and without the modules run."""
    tokens_T = random_tokens(sum(LENGTHS))
    with_, without = build(), build(mtp=None)
    own = dict(with_.named_parameters())
    assert all(torch.equal(own[name], parameter) for name, parameter in without.named_parameters())
    outs = [model(tokens_T, Stream.of_lengths(LENGTHS)) for model in (with_, without)]
    assert torch.equal(with_.logits(outs[0].hidden_TD), without.logits(outs[1].hidden_TD))
    assert torch.equal(ahead(with_, tokens_T, LENGTHS).hidden_TD, outs[1].hidden_TD)


def test_gradients_equal_finite_differences():
    model, tokens_T = build(), random_tokens(11)

    def loss() -> Tensor:
        main, modules = losses(model, tokens_T, tokens_T.roll(-1), [6, 1, 4])
        return main + 0.3 * sum(modules)

    names, weights = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss(), weights)
    for name, parameter, grad in zip(names, weights, grads, strict=True):
        direction, step, values = torch.randn_like(parameter), 1e-6, []
        for sign in (1, -2, 1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
            values.append(loss().item())
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx((grad * direction).sum().item(), rel=1e-4, abs=1e-6), name
        assert grad.abs().max() > 0, name


def test_recomputation_changes_nothing():
    model, tokens_T = build(), random_tokens(11)

    def gradients() -> tuple[Tensor, ...]:
        main, modules = losses(model, tokens_T, tokens_T.roll(-1), [7, 4])
        return torch.autograd.grad(main + sum(modules), list(model.parameters()))

    plain = gradients()
    model.recompute = True
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


def test_routings_stand_under_indices_of_their_own():
    """Layer L + k - 1 of module k, with the rows that the module ran on, so that balance counts no others."""
    out = ahead(build(MTP(depth=3)), random_tokens(sum(LENGTHS)), LENGTHS)
    assert list(out.routings) == [1]
    for k, one in enumerate(out.ahead, start=1):
        assert list(one.out.routings) == [len(LAYERS) + k - 1]
        rows = sum(max(0, length - k) for length in LENGTHS)
        assert len(one.out.routings[len(LAYERS) + k - 1].experts_TA) == rows == one.stream.positions_T.numel()
    assert list(out.all_routings) == [1, 2, 3, 4]


def test_a_layer_of_its_own():
    own = Layer(kv=MLA(heads=2, rank=4, nope_dim=4, rope_dim=2, v_dim=4), feed_forward=DENSE)
    model = build(MTP(layer=own))
    assert model.spec.all_layers == (*LAYERS, own)
    assert [type(block.feed_forward) for block in model.all_blocks] == [
        type(model.blocks[0].feed_forward), type(model.blocks[1].feed_forward), type(model.blocks[0].feed_forward)
    ]
    assert ahead(model, random_tokens(5), [5]).ahead[0].out.routings == {}


def test_a_module_follows_the_last_layer_to_another_pattern():
    model, tokens_T = build(MTP()), random_tokens(9)
    before = ahead(model, tokens_T, [9]).ahead[0].out.hidden_TD
    narrow = attending(model.spec, [Full(), Window(window=2)])
    switch(model, narrow)
    after = ahead(model, tokens_T, [9]).ahead[0].out.hidden_TD
    assert model.spec.mtp_layers[0].attention == Window(window=2)
    close(after[:1], before[:1], 1e-12)
    assert not torch.allclose(after[4:], before[4:])
    assert model.draft_memory(1).layers[0].spec.window == 2


def test_bf16_goes_through_the_modules():
    spec = model_spec(*LAYERS, mtp=MTP(hidden="pre_norm"))
    out = ahead(spec.build(BF16(), seed=1), random_tokens(8), [8])
    assert out.ahead[0].out.hidden_TD.dtype == torch.bfloat16 and out.onward_TD.dtype == torch.float32


# --- declaration and cost --------------------------------------------------------------------------------------------


def test_declarations_round_trip():
    spec = model_spec(*LAYERS, mtp=MTP(depth=2, layer=LAYERS[0], weight=LossWeight(first=0.5, until=0.25)))
    assert ModelSpec.parse(spec.to_dict()) == spec
    assert spec.override("mtp.depth=3").mtp.depth == 3
    assert model_spec(*LAYERS).mtp is None


def test_the_weight_switches_at_its_share_of_the_steps():
    """MTP-3, the schedule."""
    weight = LossWeight()
    assert [weight.at(step, 10) for step in range(10)] == 7 * [0.3] + 3 * [0.1]
    assert LossWeight(until=1.0).at(9, 10) == 0.3 and LossWeight(until=0.0).at(0, 10) == 0.1


def test_rules_hold_for_the_layer_of_a_module():
    own = LAYERS[0].replace(attention={"kind": "window", "window": 9999})
    with pytest.raises(UsageError, match=r"model\.mtp\.layer\.attention\.window"):
        check(model_spec(*LAYERS, context=64, mtp=MTP(layer=own)))


@pytest.mark.parametrize("tied", [False, True])
def test_costs_count_what_the_modules_own(tied):
    """Parameters of a built model; embedding and head again are work, not parameters."""
    spec, at = model_spec(*LAYERS, tied=tied, mtp=MTP(depth=2)), At(16)
    model = spec.build(device="meta")
    assert spec.training_cost(at).params == sum(p.numel() for p in model.parameters())
    assert spec.mtp_cost(at).params == sum(p.numel() for p in model.mtp.parameters())
    assert spec.cost(at) == model_spec(*LAYERS, tied=tied).cost(at)
    layer = LAYERS[1].cost(spec.width, at)
    assert spec.mtp_cost(at).flops == 2 * (layer.flops + 2 * 2 * spec.width**2 + 2 * spec.width * VOCAB)
    assert model_spec(*LAYERS).mtp_cost(at).params == 0


# --- drafts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", ["post_norm", "pre_norm"])
@pytest.mark.parametrize("chunks", [[[3, 2], [1, 1], [2, 1], [1, 3]], [[1, 1]] * 7, [[7, 7]]], ids=str)
def test_drafting_in_steps_equals_training(hidden, chunks):
    """Two modules in a row over their own states, two sequences, chunks of any length."""
    model, lengths = build(MTP(depth=2, hidden=hidden)), [sum(own) for own in zip(*chunks, strict=True)]
    tokens = [random_tokens(length + 2, seed=length).tolist() for length in lengths]
    together_T = torch.tensor([token for own in tokens for token in own])
    trained = ahead(model, together_T, [length + 2 for length in lengths])
    main, memories = model.memory(2), [model.draft_memory(2, module=k) for k in range(2)]
    found, at = [[], []], [0, 0]
    for chunk in chunks:
        spans = [own[a : a + n + 2] for own, a, n in zip(tokens, at, chunk, strict=True)]

        def stream(memory):
            return Stream.of_lengths(chunk, "cpu", memory)  # noqa: B023 - used at once

        def cut(k):
            return torch.tensor([t for own, n in zip(spans, chunk, strict=True) for t in own[k : k + n]])  # noqa: B023

        out = model(cut(0), stream(main))
        for k in range(2):
            out = model.draft(out.onward_TD, cut(k + 1), stream(memories[k]), k)
            found[k].append(out.hidden_TD.split(chunk))
        at = [a + n for a, n in zip(at, chunk, strict=True)]
    for k in range(2):
        stepwise = [torch.cat(parts) for parts in zip(*found[k], strict=True)]
        for b, rows_TD in enumerate(trained.ahead[k].out.hidden_TD.split(trained.ahead[k].stream.lengths)):
            close(stepwise[b], rows_TD[: lengths[b]], 1e-10)


def test_draft_states_roll_back():
    model, tokens_T = build(MTP()), random_tokens(8)
    rows_TD = model(tokens_T[:7], Stream.of_lengths([7])).onward_TD
    memory = model.draft_memory(1, undo=3)
    model.draft(rows_TD[:3], tokens_T[1:4], Stream.of_lengths([3], "cpu", memory))
    for _ in range(2):
        out = model.draft(rows_TD[3:6], tokens_T[4:7], Stream.of_lengths([3], "cpu", memory))
        memory.rollback(3)
    again = model.draft(rows_TD[3:6], tokens_T[4:7], Stream.of_lengths([3], "cpu", memory))
    assert memory.lengths == [6]
    close(again.hidden_TD, out.hidden_TD, 1e-12)
    close(out.hidden_TD, ahead(model, tokens_T, [8]).ahead[0].out.hidden_TD[3:6], 1e-10)


def test_running_ahead_needs_whole_sequences():
    model = build()
    with pytest.raises(UsageError, match="training only"):
        model(random_tokens(3), Stream.of_lengths([3], "cpu", model.memory(1)), ahead=True)
