"""What every balance term promises: it lives outside forward, so recomputation, accumulation and a look change nothing.

Formulas are held by ``axes/test_balance.py``, ranks and the training loop by ``train/test_balance_training.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from cases import PLAIN, examples, mixtures, model_spec, name, part, random_tokens
from cases import stirred as stir
from torch import Tensor

from sextant.axes.attention import Full
from sextant.axes.capacity import Experts
from sextant.axes.routing import BALANCE, TABLE, BalanceLoss, BalanceUpdate
from sextant.core.stream import Stream
from sextant.model.layer import Layer
from sextant.model.spec import ModelSpec
from sextant.model.transformer import Transformer
from sextant.train.balance import Balance

LENGTHS = [9, 4, 7, 4]
T = sum(LENGTHS)


def partners(term) -> Experts:
    """The first router and number of experts that the term can work with."""
    for router, experts in itertools.product(examples(TABLE), (8, 6)):
        try:
            router.fits(experts)
        except ValueError:
            continue
        if not list(term.clashes(router, experts)):
            return Experts.parse({"experts": experts, "hidden": 5, "router": router, "balance": (term,)})
    raise LookupError(f"no router for {term}")


TERMS = pytest.mark.parametrize("term", [pytest.param(term, id=name(term)) for term in examples(BALANCE)])


def spec_of(feed_forward: Experts) -> ModelSpec:
    one = Layer(attention=Full(), kv=PLAIN, feed_forward=feed_forward)
    return model_spec(one, one)


def step(
    spec: ModelSpec, sizes: list[int], recompute: bool = False, training: bool = True
) -> tuple[float, dict[str, Tensor], list[Tensor]]:
    """One step of balance alone, over micro-batches of so many sequences: loss, gradients, biases after the update."""
    model: Transformer = stir(spec.build(seed=3).double()).train(training)  # type: ignore[assignment]
    model.recompute = recompute
    balance, total, batches = Balance(spec), 0.0, list(micro_batches(sizes))
    if balance.ahead and len(sizes) > 1:
        balance.foresee(seeded(model, i, *one) for i, one in enumerate(batches))
    for i, (tokens_T, stream) in enumerate(batches):
        routings = seeded(model, i, tokens_T, stream)
        balance.count([routings])
        loss = balance.loss(routings, stream, T)
        if loss.requires_grad:
            loss.backward()
        total += loss.item()
    balance.update(model, 0.0)
    grads = {name_: p.grad for name_, p in model.named_parameters() if p.grad is not None}
    return total, grads, [x for name_, x in model.named_buffers() if name_.endswith("value_E")]


def micro_batches(sizes: list[int]) -> Iterator[tuple[Tensor, Stream]]:
    pieces, at = random_tokens(T).split(LENGTHS), 0
    for size in sizes:
        yield torch.cat(pieces[at : at + size]), Stream.of_lengths(LENGTHS[at : at + size])
        at += size


def seeded(model: Transformer, number: int, tokens_T: Tensor, stream: Stream):
    torch.manual_seed(number)
    return model(tokens_T, stream).routings


def same(one, other, tolerance: float) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-12)
    for got, want in zip(one[1].items(), other[1].items(), strict=True):
        assert got[0] == want[0]
        torch.testing.assert_close(got[1], want[1], rtol=tolerance, atol=tolerance)
    assert all(torch.equal(a, b) for a, b in zip(one[2], other[2], strict=True))


@TERMS
def test_counts_do_not_change_when_activations_are_computed_again(term):
    """Loss, gradient and biases, to the bit."""
    spec = spec_of(partners(term))
    same(step(spec, [2, 2], recompute=True), step(spec, [2, 2]), 0.0)


def by_batch(term) -> bool:
    """A scope that asks each micro-batch to be even by itself, or sees what has come so far."""
    return getattr(term, "scope", "") in ("micro_batch", "running")


@TERMS
def test_counts_add_up_over_micro_batches(term):
    """Two of one or three sequences are the whole batch; narrower scopes are another loss on purpose."""
    spec = spec_of(partners(term))
    whole, split = (step(spec, sizes, training=False) for sizes in ([4], [1, 3]))  # nothing is drawn per micro-batch
    if by_batch(term):
        assert whole[0] != pytest.approx(split[0], rel=1e-6)
    else:
        same(split, whole, 1e-10)


@TERMS
def test_grads_or_a_bias_come_of_it(term):
    """A loss teaches the router and nothing after it; an update moves the bias, by no gradient at all."""
    loss, grads, biases = step(spec_of(partners(term)), [4])
    if isinstance(term, BalanceUpdate):
        assert loss == 0 and not grads and any(bias_E.abs().max() > 0 for bias_E in biases)
    assert isinstance(term, BalanceLoss) != isinstance(term, BalanceUpdate)
    if isinstance(term, BalanceLoss):
        assert loss > 0 and grads["blocks.1.feed_forward.router.weight"].abs().max() > 0
        assert all(gradient.isfinite().all() for gradient in grads.values())
        assert not any(name_.startswith(("norm.", "blocks.1.feed_forward.experts")) and (g != 0).any()
                       for name_, g in grads.items())


@pytest.mark.parametrize("feed_forward", [pytest.param(one, id=part(one)) for one in mixtures()])
def test_counts_are_kept_outside_forward(feed_forward):
    """Training, evaluation, forward and backward change no entry of the state: looking is free of effects."""
    model = stir(spec_of(feed_forward).build(seed=3))
    before = {name_: x.clone() for name_, x in model.state_dict().items()}
    for training in (True, False):
        out = model.train(training)(random_tokens(T), Stream.of_lengths(LENGTHS))
        model.logits(out.hidden_TD).sum().backward()
    assert all(torch.equal(x, before[name_]) for name_, x in model.state_dict().items())
