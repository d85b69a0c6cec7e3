"""What every dtype policy promises: causal, packed apart, repeatable, finite, and gradients along those of fp32.

Which tensor is in which dtype is read off a real step in ``train/test_audit.py``; casts and scales are held by
``kernels/test_fp8_kernels.py`` and ``axes/test_fp8.py``.
"""

from __future__ import annotations

import pytest
import torch
from cases import DENSE, PLAIN, examples, mixture, model_spec, name, random_tokens, run
from torch import Tensor

from sextant.axes.attention import Window
from sextant.axes.capacity import Dense
from sextant.axes.numerics import FP32, TABLE, FP8Delayed, Numerics, is_training_state
from sextant.axes.stability import NormalInit
from sextant.core.cost import At
from sextant.core.stream import Stream
from sextant.model.layer import Layer
from sextant.model.transformer import Transformer

T, LENGTHS = 40, [17, 1, 22]
WIDTH = 32
EVERY = pytest.mark.parametrize("policy", [pytest.param(policy, id=name(policy)) for policy in examples(TABLE)])


def spec_of(*feed_forwards):
    layers = (Layer(attention=Window(window=9), kv=PLAIN, feed_forward=one) for one in feed_forwards)
    return model_spec(*layers, width=WIDTH, init=NormalInit(std=0.1))


def build(policy: Numerics, *feed_forwards) -> Transformer:
    """A model that has taken in what one step was like, where its policy learns scales from steps."""
    model = spec_of(*(feed_forwards or (DENSE, mixture()))).build(policy, seed=3)
    gradient(model)
    policy.after_step(model)
    return model


def gradient(model: Transformer) -> Tensor:
    """Of all parameters, flat, in training."""
    model.train().zero_grad()
    tokens_T = random_tokens(T)
    out = model(tokens_T, Stream.of_lengths(LENGTHS))
    model.logits(out.hidden_TD).log_softmax(-1).gather(1, tokens_T[:, None]).mean().backward()
    model.eval()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@EVERY
def test_past_token_changes_nothing_before_it(policy):
    """Not one bit, in dense layers, whose shapes do not depend on the data: scales are those of earlier steps, of a
    token's own tiles, or of the weights.
    """
    model, tokens_T = build(policy, DENSE, Dense(hidden=24)), random_tokens(T)
    before_TP = run(model, tokens_T, [T])
    tokens_T[25] = (tokens_T[25] + 1) % 23
    after_TP = run(model, tokens_T, [T])
    assert torch.equal(after_TP[:25], before_TP[:25])
    assert not torch.equal(after_TP[25:], before_TP[25:])


def test_past_is_changed_in_the_first_step_of_delayed_scales():
    """The one exemption: without a history the scale is that of the tensor itself, later tokens among them."""
    fresh, tokens_T = spec_of(DENSE).build(FP8Delayed(), seed=3).eval(), random_tokens(T)
    before_TP = run(fresh, tokens_T, [T])
    tokens_T[25] = (tokens_T[25] + 1) % 23
    assert not torch.equal(run(fresh, tokens_T, [T])[:25], before_TP[:25])


def near(got: Tensor, want: Tensor, tolerance: float) -> None:
    error = ((got - want).square().mean() / want.square().mean()).sqrt().item()
    assert error <= tolerance, f"off by {error:.2e} in the root mean square"


@EVERY
def test_prefill_and_decode_agree(policy):
    model, tokens_T, memory = build(policy, DENSE), random_tokens(T), None
    whole_TP, memory = run(model, tokens_T, [T]), model.memory(1)
    pieces = [run(model, piece, [len(piece)], memory) for piece in tokens_T.split([20] + [1] * 15 + [5])]
    near(torch.cat(pieces), whole_TP, 2e-2)


@EVERY
def test_packed_sequences_equal_separate_ones(policy):
    model, tokens_T = build(policy, DENSE), random_tokens(T)
    separate = torch.cat([run(model, x, [len(x)]) for x in tokens_T.split(LENGTHS)])
    near(run(model, tokens_T, LENGTHS), separate, 2e-2)


@EVERY
def test_grads_point_where_fp32_does(policy):
    """The whole gradient through a mixture, and the same bits when activations are computed again."""
    model, exact = build(policy), build(FP32())
    got, want = gradient(model), gradient(exact)
    assert got.dtype == torch.float32 and got.isfinite().all()
    assert torch.cosine_similarity(got, want, dim=0) > 0.99
    model.recompute = True
    assert torch.equal(gradient(model), got)


@EVERY
def test_counts_of_copies_do_not_depend_on_recomputation(policy):
    model, tokens_T = build(policy), random_tokens(T)
    counts = []
    for recompute in (False, True):
        model.recompute = recompute
        out = model.train()(tokens_T, Stream.of_lengths(LENGTHS))
        out.hidden_TD.sum().backward()
        counts.append([routing.counts_E() for routing in out.routings.values()])
        assert all(routing.gates_TA.dtype == torch.float32 for routing in out.routings.values())
    assert all(torch.equal(a, b) and int(a.sum()) == 2 * T for a, b in zip(*counts, strict=True))


@EVERY
def test_hard_rows_stay_finite_and_repeat(policy):
    """Embeddings that jump by 1e4 between two steps: what does not fit saturates; the same bits twice."""
    model = build(policy)
    with torch.no_grad():
        model.embedding.weight.mul_(1e4)
    first = run(model, random_tokens(T), LENGTHS)
    assert first.isfinite().all() and torch.equal(run(model, random_tokens(T), LENGTHS), first)
    assert gradient(model).isfinite().all()


@EVERY
def test_cost_and_names_are_those_of_fp32(policy):
    """A policy adds no parameter, and no entry to a served model."""
    spec, model = spec_of(DENSE, mixture()), build(policy)
    assert spec.cost(At(24, policy.itemsize)).params == sum(p.numel() for p in model.parameters())
    served = {name_ for name_ in model.state_dict() if not is_training_state(name_)}
    assert served == set(build(FP32()).state_dict())
