"""Attention's output gain at 0: a network that starts without attention, keeps its routers healthy, and learns it."""

from functools import partial

import pytest
import torch
from cases import close, model_spec, random_tokens, run
from torch import Tensor

from sextant.axes.attention import Full, Window
from sextant.axes.capacity import Dense, Experts
from sextant.axes.kv import GQA, NoPE
from sextant.axes.routing import SoftmaxTopK
from sextant.axes.stability import NormalInit, RMSNorm, SandwichNorm
from sextant.core.stream import Stream
from sextant.kernels.loss import summed_loss
from sextant.model.spec import Layer, repeat, stack

KV = GQA(heads=4, kv_heads=2, head_dim=8, qk_norm=RMSNorm())
OFF = ("kv.q.weight", "kv.k.weight", "kv.v.weight", "kv.o.weight", "kv.q_norm.gain", "kv.k_norm.gain")


@pytest.fixture
def model():
    """Local and global attention, dense and sparse layers, as the recipe alternates them."""
    layers = stack(
        4,
        attention=repeat([Window(window=4), Full()], 4),
        kv=repeat([KV, KV.replace(position=NoPE())], 4),
        feed_forward=repeat([Dense(hidden=24), Experts(experts=8, hidden=8)], 4),
        residual=SandwichNorm(attention_gain=0.0),
    )
    return model_spec(*layers, width=16, init=NormalInit()).build(seed=2)


def test_attention_leaves_every_row_alone(model):
    """``a_i == x_i``, bit for bit, in every layer."""
    seen: list[tuple[Tensor, Tensor]] = []
    for block in model.blocks:
        block.around_attention.register_forward_hook(lambda m, args, out: seen.append((args[0], out[0])))
    run(model, random_tokens(20), [20])
    assert len(seen) == 4
    assert all(torch.equal(before, after) for before, after in seen)


def test_context_does_not_matter(model):
    tokens_T = random_tokens(20)
    shuffled_T = torch.cat([tokens_T[:-1][torch.randperm(19)], tokens_T[-1:]])
    close(run(model, shuffled_T, [20])[-1], run(model, tokens_T, [20])[-1], 1e-6)


def test_equals_the_model_without_attention(model):
    tokens_T = random_tokens(20)
    with torch.no_grad():
        x_TD, stream = model.embedding(tokens_T), Stream.of_lengths([20])
        for block in model.blocks:
            x_TD, _ = block.around_feed_forward(x_TD, partial(block.feed_forward, stream=stream))
        assert torch.equal(model.logits(model.norm(x_TD)), run(model, tokens_T, [20]))


def gradients(model) -> dict[str, Tensor]:
    tokens_T = random_tokens(60)
    model.zero_grad()
    out = model(tokens_T, Stream.of_lengths([20, 40]))
    (summed_loss(out.hidden_TD, model.head_PD, tokens_T.roll(-1)) / 60).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_first_gradients_are_zero_but_for_the_gain(model):
    grads = gradients(model)
    for index in range(4):
        at = f"blocks.{index}."
        off = [f"{at}attention.{name}" for name in OFF] + [f"{at}around_attention.norm.gain"]
        assert {name for name in off if (grads[name] != 0).any()} == set()
        assert (grads[f"{at}around_attention.norm_out.gain"] != 0).all()
    learning = [name for name in grads if "feed_forward" in name or name.startswith(("embedding", "head", "norm"))]
    assert [name for name in learning if not (grads[name] != 0).any()] == []


def test_one_step_later_attention_learns(model):
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    gradients(model)
    optimiser.step()
    grads = gradients(model)
    assert [name for name, grad in grads.items() if not grad.isfinite().all()] == []
    assert [name for name in grads if ".attention." in name and not (grads[name] != 0).any()] == []


def test_scale_of_the_gates_is_invisible_under_an_output_norm():
    """Raw and normalised gates differ by a factor per token, which the norm removes; a shared expert brings it back."""
    for shared, same in ((0, True), (8, False)):
        outputs = []
        for normalize in (False, True):
            router = SoftmaxTopK(top_k=2, normalize=normalize)
            feed_forward = Experts(experts=8, hidden=8, router=router, shared=shared)
            layer = Layer(kv=KV, feed_forward=feed_forward, residual=SandwichNorm())
            model = model_spec(layer, width=16, init=NormalInit(std=0.3)).build(seed=1)
            outputs.append(run(model, random_tokens(20), [20]))
        assert torch.allclose(*outputs, atol=1e-4) is same


DEPTH, EXPERTS, CHOSEN, TOKENS = 24, 64, 4, 512


def loads(gain: float, seed: int) -> Tensor:
    """MaxVio of each layer at the start: ``max load / mean load - 1``, on tokens with a Zipf distribution."""
    feed_forward = Experts(experts=EXPERTS, hidden=16, router=SoftmaxTopK(top_k=CHOSEN))
    kv, residual = GQA(heads=4, kv_heads=4, head_dim=32), SandwichNorm(attention_gain=gain)
    layers = [Layer(kv=kv, feed_forward=feed_forward, residual=residual)] * DEPTH
    # Rows of unit variance: under an output norm, rows of 0.02 would be drowned by the first layer's attention.
    spec = model_spec(*layers, width=128, vocab=512, init=NormalInit(), embedding_scale=50.0)
    model = spec.build(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tokens_T = torch.multinomial(1 / torch.arange(1, 513), TOKENS, replacement=True, generator=generator)
    with torch.no_grad():
        routings = model(tokens_T, Stream.of_lengths([TOKENS])).routings
    counts_LE = torch.stack([routing.counts_E() for routing in routings.values()])
    return counts_LE.max(1).values * EXPERTS / (CHOSEN * TOKENS) - 1


def test_load_at_the_start_grows_with_depth_only_where_attention_is_on():
    """Attention at the start is a running mean: rows become alike, and so do the experts they choose."""
    violations = {gain: torch.stack([loads(gain, seed) for seed in range(3)]).mean(0) for gain in (1.0, 0.0)}
    print("\nMaxVio at layer " + " ".join(f"{i:6d}" for i in range(0, DEPTH, 3)))
    for gain, values in violations.items():
        print(f"  gain {gain:g}        " + " ".join(f"{v:6.1f}" for v in values[::3].tolist()))
    on, off = violations[1.0], violations[0.0]
    assert on[-4:].mean() > 1.4 * on[0]
    assert off[-4:].mean() < 1.2 * off[0]
    assert on[-4:].mean() > 3 * off[-4:].mean()
