"""What every feed-forward, placement, norm and start promises: the contract of the whole model, gradients included.

Whatever starts at 0 is moved first: a branch that is switched off would keep any promise.
"""

from __future__ import annotations

import pytest
import torch
from cases import DENSE, PLAIN, chunked, close, examples, mixture, model_spec, name, random_tokens, run
from cases import stirred as stir
from torch import Tensor
from torch.func import functional_call

from sextant.axes.attention import Window
from sextant.axes.capacity import TABLE as CAPACITY
from sextant.axes.stability import INITS, NORMS, TABLE, PreNorm
from sextant.core.cost import At
from sextant.core.stream import Stream
from sextant.model.layer import Layer
from sextant.model.spec import ModelSpec

T, LENGTHS = 15, [6, 1, 8]


def spec_of(residual=PreNorm(), first=DENSE, **fields) -> ModelSpec:  # noqa: B008 - frozen
    """A dense layer, or another ``first``, and a mixture, both in a window."""
    layers = (
        Layer(attention=Window(window=5), kv=PLAIN, feed_forward=feed_forward, residual=residual)
        for feed_forward in (first, mixture())
    )
    return model_spec(*layers, **fields)


CASES = [
    *(pytest.param(spec_of(first=example), id=name(example)) for example in examples(CAPACITY)),
    *(pytest.param(spec_of(example), id=name(example)) for example in examples(TABLE)),
    *(pytest.param(spec_of(PreNorm(norm=norm), final_norm=norm), id=name(norm)) for norm in examples(NORMS)),
    *(pytest.param(spec_of(init=init), id=name(init)) for init in examples(INITS)),
]
EVERY = pytest.mark.parametrize("spec", CASES)


def build(spec: ModelSpec):
    return stir(spec.build(seed=3).double())


@EVERY
def test_past_token_changes_nothing_before_it(spec):
    own, tokens_T = build(spec).eval(), random_tokens(T)
    before_TP = run(own, tokens_T, [T])
    tokens_T[9] = (tokens_T[9] + 1) % 23
    after_TP = run(own, tokens_T, [T])
    close(after_TP[:9], before_TP[:9])
    assert (after_TP[9] - before_TP[9]).abs().max() > 1e-6 * before_TP.abs().max()


@EVERY
def test_prefill_chunks_and_decode_agree(spec):
    own, tokens_T = build(spec).eval(), random_tokens(T)
    whole_TP = run(own, tokens_T, [T])
    for sizes in ([1] * T, [7, 1, 1, 6]):
        close(chunked(own, tokens_T, sizes), whole_TP)


@EVERY
def test_packed_sequences_equal_separate_ones(spec):
    own, tokens_T = build(spec).eval(), random_tokens(T)
    close(run(own, tokens_T, LENGTHS), torch.cat([run(own, x, [len(x)]) for x in tokens_T.split(LENGTHS)]))


@EVERY
def test_grads_equal_finite_differences(spec):
    """Of every parameter of the model, along a random direction; they add up over packed sequences."""
    own, tokens_T, generator = build(spec), random_tokens(T), torch.Generator().manual_seed(9)
    at = {name_: p.detach() for name_, p in own.named_parameters()}
    weight_TD = torch.randn(T, spec.width, generator=generator, dtype=torch.float64)

    def value(given: dict[str, Tensor], here: slice = slice(None), lengths: list[int] = LENGTHS) -> Tensor:
        out = functional_call(own, given, (tokens_T[here], Stream.of_lengths(lengths)))
        return (out.hidden_TD * weight_TD[here]).sum()

    def gradient(*where: object) -> list[Tensor | None]:
        leaves = {name_: x.clone().requires_grad_() for name_, x in at.items()}
        return list(torch.autograd.grad(value(leaves, *where), list(leaves.values()), allow_unused=True))

    parts = [gradient(slice(0, 6), [6]), gradient(slice(6, 7), [1]), gradient(slice(7, 15), [8])]
    for (name_, leaf), got, *pieces in zip(at.items(), gradient(), *parts, strict=True):
        if got is None:
            assert name_.startswith("head."), name_
            continue
        close(got, sum(piece for piece in pieces if piece is not None), 1e-9)
        along = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        step = 1e-6 * along / along.norm()
        up, down = (value(at | {name_: leaf + sign * step}) for sign in (1, -1))
        want = ((up - down) / 2e-6).item()
        assert (got * along).sum().item() / along.norm().item() == pytest.approx(want, rel=1e-5, abs=1e-5), name_


@EVERY
def test_cost_of_the_model_counts_its_parameters(spec):
    built = spec.build(device="meta")
    assert spec.cost(At(tokens=24, itemsize=4)).params == sum(p.numel() for p in built.parameters())


@EVERY
def test_hard_rows_stay_finite_in_fp32(spec):
    """A start as declared, not stirred, under embeddings a thousand times too large: nothing but numbers."""
    own = spec.build(seed=3)
    with torch.no_grad():
        own.embedding.weight.mul_(1e3)
    out = own(random_tokens(T), Stream.of_lengths(LENGTHS))
    own.logits(out.hidden_TD).mean().backward()
    assert out.hidden_TD.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in own.parameters())
