"""Replay of recorded choices, over every selecting pattern, router and overflow rule.

A record replayed as it was made changes no bit, in training, prompts and single steps; under other weights the choices
stay and everything else is new (MAI-Base-1, section 6.4).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from cases import MOE, PLAIN, WIDTH, examples, mixtures, model_spec, name, params, part, random_tokens, stirred
from torch import Tensor, nn

from sextant.axes.attention import DSA, TABLE, Full, InfLLM, MoBA
from sextant.axes.attention.base import SelectingPattern
from sextant.axes.capacity import Dense, Experts
from sextant.axes.numerics import BF16
from sextant.axes.routing import SoftmaxTopK
from sextant.axes.stability import NormalInit
from sextant.core.errors import UsageError
from sextant.core.stream import Stream
from sextant.core.trace import Trace
from sextant.model.layer import Layer
from sextant.model.transformer import Output, Transformer

T, LENGTHS = 24, [9, 1, 14]
SELECTING = [pattern for pattern in examples(TABLE) if isinstance(pattern, SelectingPattern)]


def layers() -> Iterator[Layer]:
    """Every selecting pattern beside one mixture, and every mixture beside full attention."""
    for attention in SELECTING:
        yield Layer.parse({"attention": attention, "kv": PLAIN, "feed_forward": MOE})
    for feed_forward in mixtures():
        yield Layer.parse({"attention": Full(), "kv": PLAIN, "feed_forward": feed_forward})


CASES = [
    pytest.param(layer, id=name(layer.attention) if layer.feed_forward == MOE else part(layer.feed_forward))
    for layer in layers()
]


def build(layer: Layer, seed: int = 3) -> Transformer:
    """Two such layers in fp32, of which the second stands above a dense one."""
    dense = layer.replace(attention=Full(), feed_forward=Dense(hidden=9))
    return stirred(model_spec(layer, dense, layer).build(seed=seed))  # type: ignore[return-value]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def trained(model: Transformer, trace: Trace | None = None) -> tuple[Output, dict[str, Tensor]]:
    """One step of training without its update: the same draws each time."""
    torch.manual_seed(7)
    out = model.train()(random_tokens(T), Stream.of_lengths(LENGTHS).replaying(trace))
    model.logits(out.hidden_TD).square().sum().backward()
    return out, gradients(model)


@torch.no_grad()
def fed(model: Transformer, steps: list[list[int]], traces: list[Trace] | None = None) -> list[Output]:
    """Two sequences, some tokens of each at a time."""
    model.eval()
    memory, tokens_T, outs, at = model.memory(2), random_tokens(99), [], 0
    for i, lengths in enumerate(steps):
        stream = Stream.of_lengths(lengths, memory=memory).replaying(traces[i] if traces else None)
        outs.append(model(tokens_T[at : at + sum(lengths)], stream))
        at += sum(lengths)
    return outs


STEPS = [[11, 7], [1, 1], [1, 0], [1, 1], [3, 4], [1, 1]]


@pytest.mark.parametrize("layer", CASES)
def test_own_record_changes_no_bit_in_training(layer):
    """Nor a bit of any gradient, also where activations are computed again."""
    model = build(layer)
    out, grads = trained(model)
    again, replayed = trained(model, out.trace())
    assert torch.equal(again.hidden_TD, out.hidden_TD)
    assert again.trace().same(out.trace())
    model.recompute = True
    recomputed, third = trained(model, out.trace())
    assert torch.equal(recomputed.hidden_TD, out.hidden_TD) and recomputed.trace().same(out.trace())
    for name_, gradient in grads.items():
        assert torch.equal(replayed[name_], gradient) and torch.equal(third[name_], gradient), name_


@pytest.mark.parametrize("layer", CASES)
def test_own_record_changes_no_bit_in_prompts_and_steps(layer):
    model = build(layer)
    outs = fed(model, STEPS)
    traces = [out.trace() for out in outs]
    for out, again, trace in zip(outs, fed(model, STEPS, traces), traces, strict=True):
        assert torch.equal(again.hidden_TD, out.hidden_TD) and again.trace().same(trace)


@pytest.mark.parametrize("layer", CASES)
def test_a_record_of_steps_trains_as_one_packed_row(layer):
    """What was chosen while decoding holds in a learner with other weights: same experts, same counts, same blocks; and
    gates and attention are those of the new weights, with gradients.
    """
    parts = [out.trace().split(lengths) for out, lengths in zip(fed(build(layer), STEPS), STEPS, strict=True)]
    one, two = (Trace.cat([step[b] for step in parts if step[b].tokens]) for b in range(2))
    trace, learner = Trace.cat([two, one]), build(layer, seed=4)
    stream = Stream.of_lengths([two.tokens, one.tokens])
    out = learner.train()(random_tokens(trace.tokens), stream.replaying(trace))
    assert out.trace().same(trace)
    for index, routing in out.routings.items():
        assert torch.equal(routing.experts_TA, trace.routes[index].experts_TA)
    learner.logits(out.hidden_TD).square().sum().backward()
    for block in learner.blocks:
        if isinstance(router := getattr(block.feed_forward, "router", None), nn.Module):
            assert router.weight.grad.isfinite().all() and router.weight.grad.abs().max() > 0


def own_affair(part: object) -> bool:
    """Not: experts that choose, capacity that is shared, a row of queries that choose as one."""
    if isinstance(part, Experts):
        return part.router.kind != "expert_choice" and part.overflow.kind in ("dropless", "capped_rounds")
    return getattr(part, "pool", "none") == "none" and getattr(part, "exec_block", 1) == 1


@pytest.mark.parametrize(
    "layer", [case for case in CASES if all(map(own_affair, (case.values[0].attention, case.values[0].feed_forward)))]
)
@torch.no_grad()
def test_chunks_record_what_the_whole_records(layer):
    """Where a choice is its token's own affair; routers that are not causal differ by design."""
    model, tokens_T = build(layer).double().eval(), random_tokens(18)
    whole = model(tokens_T, Stream.of_lengths([18])).trace()
    memory, parts = model.memory(1), []
    for piece in tokens_T.split([5, 1, 1, 8, 3]):
        parts.append(model(piece, Stream.of_lengths([len(piece)], memory=memory)).trace())
    assert Trace.cat(parts).same(whole)


def reads_its_choice(attention: SelectingPattern) -> bool:
    """DSA's dense stage reads everything and only learns to choose."""
    return not (isinstance(attention, DSA) and attention.stage == "dense")


@pytest.mark.parametrize("attention", params(filter(reads_its_choice, SELECTING)))
def test_other_blocks_are_read(attention):
    """The record is followed, not merely carried: with other blocks the output differs, and it is what they give."""
    layer = Layer.parse({"attention": attention, "kv": PLAIN, "feed_forward": Dense(hidden=9)})
    model = model_spec(layer).build(seed=3).double().eval()
    stream, tokens_T = Stream.of_lengths([T]), random_tokens(T)
    with torch.no_grad():
        out = model(tokens_T, stream)
        reads = out.trace().reads[0]
        own_T = torch.arange(T) // reads.block
        last = torch.where(reads.blocks_THJ == own_T[:, None, None], reads.blocks_THJ, -1)
        fewer = Trace(T, reads={0: type(reads)(last, reads.block)})
        again = model(tokens_T, stream.replaying(fewer))
    assert again.trace().same(fewer)
    if not out.trace().same(fewer):
        assert (again.hidden_TD - out.hidden_TD).abs().max() > 1e-6


def test_a_pattern_that_is_full_while_it_trains_reads_the_record():
    """InfLLM and Seer's gates read everything in training, unless a record says what was read."""
    attention = next(pattern for pattern in SELECTING if isinstance(pattern, InfLLM))
    layer = Layer.parse({"attention": attention, "kv": PLAIN, "feed_forward": MOE})
    model = build(layer)
    stream, tokens_T = Stream.of_lengths([T]), random_tokens(T)
    sparse = model.eval()(tokens_T, stream)
    full = model.train()(tokens_T, stream)
    assert sparse.trace().reads and not full.trace().reads
    again = model.train()(tokens_T, stream.replaying(sparse.trace()))
    assert torch.equal(again.hidden_TD, sparse.hidden_TD) and not torch.equal(full.hidden_TD, sparse.hidden_TD)


MOBA = Layer.parse({"attention": MoBA(block=4, top_k=2), "kv": PLAIN, "feed_forward": MOE})


def replayed(layer: Layer, trace: Trace, tokens: int = T) -> Output:
    return build(layer).eval()(random_tokens(tokens), Stream.of_lengths([tokens]).replaying(trace))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda t: t[: T - 1], "the record is of other tokens"),
        (lambda t: Trace(T, {0: t.routes[0]}, t.reads), r"experts: layers\[2\].feed_forward \(got none, expected some"),
        (lambda t: Trace(T, t.routes | {1: t.routes[0]}, t.reads), r"experts: layers\[1\].* \(got 5, expected none"),
        (lambda t: Trace(T, t.routes | {5: t.routes[0]}, t.reads), r"layer count: layers\[5\] \(got 6, expected 3"),
        (lambda t: Trace(T, t.routes, {0: t.reads[0]}), r"no blocks for a layer that selects: layers\[2\]"),
        (lambda t: Trace(T, t.routes, t.reads | {1: t.reads[0]}), r"full reads no chosen blocks: layers\[1\]"),
    ],
)
def test_a_record_that_lacks_or_exceeds_is_refused(change, line):
    trace = build(MOBA).eval()(random_tokens(T), Stream.of_lengths([T])).trace()
    with pytest.raises(UsageError, match=line):
        replayed(MOBA, change(trace))


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"feed_forward": MOE.replace(experts=6)}, r"layers\[0\].feed_forward.experts \(got 5, expected 6\)"),
        ({"feed_forward": MOE.replace(router=SoftmaxTopK(top_k=3))}, r"router.top_k \(got 2, expected 3\)"),
        ({"feed_forward": Dense(hidden=9)}, r"layers\[0\].feed_forward \(got 5, expected none\)"),
        ({"attention": MoBA(block=8, top_k=2)}, r"layers\[0\].attention.block \(got 4, expected 8\)"),
        ({"attention": MoBA(block=4, top_k=2, per="group")}, r"of other choices.*4 choosers, expected 2 choosers"),
        ({"attention": Full()}, r"full reads no chosen blocks: layers\[0\].attention"),
    ],
)
def test_a_record_of_another_model_is_refused(changed, line):
    trace = build(MOBA).eval()(random_tokens(T), Stream.of_lengths([T])).trace()
    with pytest.raises(UsageError, match=line):
        replayed(MOBA.replace(**changed), trace)


def test_blocks_beyond_the_sequence_are_refused():
    model = build(MOBA).eval()
    trace = model(random_tokens(T), Stream.of_lengths([T])).trace()
    with pytest.raises(UsageError, match="blocks that the sequence has not got: sequence 1"):
        model(random_tokens(T), Stream.of_lengths([8, 16]).replaying(trace))


def test_dsa_reads_everything_in_its_dense_stage():
    layer = MOBA.replace(attention=DSA(top_k=4, heads=2, head_dim=6, block=4))
    trace = build(layer).eval()(random_tokens(T), Stream.of_lengths([T])).trace()
    with pytest.raises(UsageError, match="dsa reads all in its dense stage"):
        replayed(layer.replace(attention=layer.attention.replace(stage="dense")), trace)


@torch.no_grad()
def test_a_sampler_in_bf16_and_a_learner_in_fp32_agree_when_choices_are_replayed():
    """ROUTE-4. Rounding flips experts; with the sampler's experts the mismatch falls below a fifth."""
    layer = Layer(kv=PLAIN, feed_forward=Experts(experts=16, hidden=32, router=SoftmaxTopK(top_k=2, normalize=True)))
    spec = model_spec(*[layer] * 4, width=64, init=NormalInit(std=0.2))
    learner, sampler = spec.build(), spec.build(BF16())
    tokens_T, stream = random_tokens(512), Stream.of_lengths([64] * 8)

    def log_probs(model: Transformer, stream: Stream) -> tuple[Tensor, Trace]:
        out = model(tokens_T, stream)
        logs_TP = model.logits(out.hidden_TD).log_softmax(-1)
        return logs_TP.gather(1, tokens_T.roll(-1)[:, None])[:, 0], out.trace()

    def k3(logs_T: Tensor) -> float:
        ratio_T = logs_T - sampled_T
        return (ratio_T.exp() - 1 - ratio_T).mean().item()

    sampled_T, trace = log_probs(sampler, stream)
    live_T, own = log_probs(learner, stream)
    replayed_T, _ = log_probs(learner, stream.replaying(trace))
    assert not own.same(trace)
    assert k3(replayed_T) < 0.2 * k3(live_T)


def test_a_given_choice_has_the_gradient_of_its_gather():
    """Shuffled experts: other experts, and the router's gradient is that of gathering its probabilities."""
    layer = MOBA.replace(attention=Full())
    model = build(layer).double()
    module = model.blocks[0].feed_forward
    x_TD, experts_TA = torch.randn(T, WIDTH, dtype=torch.float64), torch.rand(T, 5).argsort(-1)[:, :2]
    weight_TA = torch.randn(T, 2, dtype=torch.float64)
    routing = module.router(x_TD, experts_TA)
    (got,) = torch.autograd.grad((routing.gates_TA * weight_TA).sum(), module.router.weight)
    leaf = copy.deepcopy(module.router.weight)
    probs_TE = (x_TD @ leaf.T).softmax(-1)
    (want,) = torch.autograd.grad((probs_TE[torch.arange(T)[:, None], experts_TA] * weight_TA).sum(), leaf)
    torch.testing.assert_close(got, want)
    assert torch.equal(routing.experts_TA, experts_TA) and not torch.equal(module.router(x_TD).experts_TA, experts_TA)
