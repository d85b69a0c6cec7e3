"""Gated DeltaNet and KDA beyond the contract suite: their definition in loops, start, costs, states, precision."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import DENSE, built, close, kept_bytes, model_spec, params, random_tokens, run
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sextant.axes.attention import KDA, GatedDelta, Mixer
from sextant.axes.attention.delta import Forget, ShortConv
from sextant.axes.numerics import BF16, FP32
from sextant.core.cost import At
from sextant.core.errors import UsageError
from sextant.core.state import JointState, RecurrentState, RowState
from sextant.core.stream import Stream
from sextant.model.spec import Layer

WIDTH = 12
MIXERS = [
    GatedDelta(key_heads=2, value_heads=4, head_dim=5, value_dim=4, chunk=4),
    GatedDelta(key_heads=3, value_heads=3, head_dim=4, value_dim=6, taps=2, chunk=8),
    KDA(heads=3, head_dim=5, chunk=4),
    KDA(heads=2, head_dim=6, taps=3, chunk=7),
]


def filled(spec: Mixer, width: int = WIDTH):
    torch.manual_seed(0)
    module = spec.build(width, FP32()).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def convolved(x_TC: Tensor, weight: Tensor) -> Tensor:
    """SiLU of the sum over taps, channel by channel."""
    taps, rows = weight.shape[-1], []
    for t in range(len(x_TC)):
        row = torch.zeros_like(x_TC[0])
        for back in range(min(taps, t + 1)):
            row = row + weight[:, 0, taps - 1 - back] * x_TC[t - back]
        rows.append(row)
    return F.silu(torch.stack(rows))


def corrected(q_TK: Tensor, k_TK: Tensor, v_TV: Tensor, decay_TK: Tensor, beta_T: Tensor) -> Tensor:
    """One head by the formula, with its matrices."""
    q_TK, k_TK = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q_TK, k_TK))
    size = k_TK.shape[-1]
    now, rows = torch.zeros(size, v_TV.shape[-1], dtype=q_TK.dtype), []
    for q, k, v, decay, beta in zip(q_TK, k_TK, v_TV, decay_TK, beta_T, strict=True):
        now = (torch.eye(size) - beta * torch.outer(k, k)) @ (decay[:, None] * now) + beta * torch.outer(k, v)
        rows.append(q @ now / size**0.5)
    return torch.stack(rows)


def rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return gain * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def gated_delta_by_hand(spec: GatedDelta, module, x_TD: Tensor) -> Tensor:
    served, k_dim, v_dim = spec.value_heads // spec.key_heads, spec.head_dim, spec.value_dim
    projected, ba = x_TD @ module.qkvz.weight.t(), x_TD @ module.ba.weight.t()
    each, rows = 2 * k_dim + 2 * served * v_dim, {"q": [], "k": [], "v": [], "z": [], "b": [], "a": []}
    for g in range(spec.key_heads):
        q, k, v, z = projected[:, g * each : (g + 1) * each].split((k_dim, k_dim, *[served * v_dim] * 2), -1)
        b, a = ba[:, 2 * g * served : 2 * (g + 1) * served].chunk(2, -1)
        for name, part in zip(rows, (q, k, v, z, b, a), strict=True):
            rows[name].append(part)
    q, k, v, z, b, a = (torch.cat(parts, -1) for parts in rows.values())
    sizes = [spec.key_heads * k_dim] * 2 + [spec.value_heads * v_dim]
    q, k, v = convolved(torch.cat((q, k, v), -1), module.core.conv.weight).split(sizes, -1)
    heads = []
    for h in range(spec.value_heads):
        keys, values = slice(h // served * k_dim, (h // served + 1) * k_dim), slice(h * v_dim, (h + 1) * v_dim)
        decay_T = (-module.forget.rate_log_H[h].exp() * F.softplus(a[:, h] + module.forget.bias[h])).exp()
        o = corrected(q[:, keys], k[:, keys], v[:, values], decay_T[:, None].expand(-1, k_dim), b[:, h].sigmoid())
        heads.append(rms(o, module.norm.gain, spec.norm.eps) * F.silu(z[:, values]))
    return torch.cat(heads, -1) @ module.o.weight.t()


def kda_by_hand(spec: KDA, module, x_TD: Tensor) -> Tensor:
    joined = torch.cat([x_TD @ part.weight.t() for part in (module.q, module.k, module.v)], -1)
    q, k, v = convolved(joined, module.core.conv.weight).chunk(3, -1)
    logits = x_TD @ module.decay_down.weight.t() @ module.decay_up.weight.t() + module.forget.bias
    gate = (x_TD @ module.gate_down.weight.t() @ module.gate_up.weight.t()).sigmoid()
    beta_TH, heads = (x_TD @ module.beta.weight.t()).sigmoid(), []
    for h in range(spec.heads):
        own = slice(h * spec.head_dim, (h + 1) * spec.head_dim)
        decay_TK = (-module.forget.rate_log_H[h].exp() * F.softplus(logits[:, own])).exp()
        o = corrected(q[:, own], k[:, own], v[:, own], decay_TK, beta_TH[:, h])
        heads.append(rms(o, module.norm.gain, spec.norm.eps) * gate[:, own])
    return torch.cat(heads, -1) @ module.o.weight.t()


BY_HAND = {"gated_delta": gated_delta_by_hand, "kda": kda_by_hand}


@pytest.mark.parametrize("spec", params(MIXERS))
def test_mixer_by_definition(spec):
    """Heads apart, tokens apart; outputs and gradients."""
    module, x_TD = filled(spec), torch.randn(11, WIDTH, dtype=torch.float64, requires_grad=True)
    got_TD, want_TD = module(x_TD, Stream.of_lengths([11]), None), BY_HAND[spec.kind](spec, module, x_TD)
    close(got_TD, want_TD)
    upstream_TD = torch.randn_like(got_TD)
    leaves = [x_TD, *module.parameters()]
    for got, want in zip(*(torch.autograd.grad(y, leaves, upstream_TD) for y in (got_TD, want_TD)), strict=True):
        close(got, want, 1e-9)


@pytest.mark.parametrize("spec", params(MIXERS))
def test_documents_around_the_chunk_and_the_taps(spec):
    """Lengths about the chunk and the convolution, an empty one too: packed against one by one, and gradients."""
    module, chunk = filled(spec), spec.chunk
    lengths = [1, chunk - 1, 0, chunk, chunk + 1, chunk + 1, 2, 2 * chunk, 1, 3]
    x_TD = torch.randn(sum(lengths), WIDTH, dtype=torch.float64)
    packed_TD = module(x_TD, Stream.of_lengths(lengths), None)
    separate_TD = torch.cat([module(part, Stream.of_lengths([len(part)]), None) for part in x_TD.split(lengths)])
    close(packed_TD, separate_TD)
    got, want = (torch.autograd.grad(y.square().sum(), list(module.parameters())) for y in (packed_TD, separate_TD))
    for a, b in zip(got, want, strict=True):
        close(a, b, 1e-10)


def test_short_conv_ends_at_the_beginning_of_its_sequence():
    """Own tap last; each sequence starts from zeros."""
    conv = ShortConv(1, 3).double()
    conv.weight.data = torch.tensor([[[1.0, 10.0, 100.0]]], dtype=torch.float64)
    x_TC = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]], dtype=torch.float64)
    got = conv(x_TC, Stream.of_lengths([3, 0, 2]), None).flatten().tolist()
    assert got == [100.0, 210.0, 321.0, 400.0, 540.0]


@pytest.mark.parametrize("heads, each", [(4, 1), (3, 5), (1, 1)])
def test_heads_start_with_rates_over_four_decades(heads, each):
    """softplus of the bias from 0.001 to 0.1, rates from 1 to 16; every head of several channels has a range."""
    forget = Forget(heads, each)
    forget.fill(1.0)
    decay_HK = forget(torch.zeros(1, heads * each))[0]
    assert (decay_HK < 0).all()
    steps = F.softplus(forget.bias).view(heads, each)
    assert steps.min().item() == pytest.approx(1e-3, rel=1e-4)
    if heads * each > 1:
        assert steps.max().item() == pytest.approx(0.1, rel=1e-4)
        assert forget.rate_log_H.exp().tolist() == pytest.approx(torch.linspace(1, 16, heads).tolist(), rel=1e-5)
    if each > 1:
        assert (steps.amax(1) / steps.amin(1) > 10).all()


@pytest.mark.parametrize("spec", params(MIXERS))
def test_a_fresh_model_looks_back_beyond_its_taps(spec):
    """Token 0 reaches the last of 40 through the state: the start is neither forgetful nor blind."""
    model, tokens_T = built(spec, None, layers=1), random_tokens(40)
    before_TP = run(model, tokens_T, [40])
    tokens_T[0] = (tokens_T[0] + 1) % 23
    assert (run(model, tokens_T, [40])[-1] - before_TP[-1]).abs().max() > 1e-6


def test_value_heads_must_be_shared_out():
    with pytest.raises(UsageError, match="value_heads 3 must be a multiple of key_heads 2"):
        GatedDelta.parse({"key_heads": 2, "value_heads": 3, "head_dim": 4, "value_dim": 4})


@pytest.mark.parametrize("spec", params(MIXERS))
@pytest.mark.parametrize("tokens", [2, 6, 24, 65])
def test_flops_are_those_of_the_counter(spec, tokens):
    """Products by the machine, which also forms upper triangles; but not by it: what the solver does, ``2 (K + V)`` for
    each pair below the diagonal, and in halves a channel's overlap of a token with itself.
    """
    module, shape = spec.build(WIDTH, FP32()), spec.shape
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.randn(tokens, WIDTH), Stream.of_lengths([tokens]), None)
    whole, rest = divmod(tokens, shape.chunk)
    below = whole * shape.chunk * (shape.chunk - 1) // 2 + rest * (rest - 1) // 2
    k_dim, v_dim = shape.k_dim, shape.v_dim
    expected = spec.cost(WIDTH, At(tokens, itemsize=4)).flops * tokens
    expected -= shape.value_heads * 2 * (k_dim + v_dim) * below  # solver
    expected += shape.value_heads * 2 * v_dim * below  # upper triangle of the product with corrections
    if spec.kind == "gated_delta":
        expected += shape.value_heads * (4 * k_dim * below + 2 * k_dim * tokens)  # overlaps and scores, whole squares
    else:
        expected -= shape.value_heads * 2 * k_dim * tokens  # a token's score of itself
    drawn = counter.get_total_flops()
    if spec.kind == "kda" and shape.chunk & (shape.chunk - 1):
        assert expected <= drawn < 1.3 * expected  # odd halves are padded
    elif spec.kind == "kda" and rest & (rest - 1):
        assert expected <= drawn < 1.1 * expected
    else:
        assert drawn == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("numerics", [FP32(), BF16()], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "spec",
    params([
        GatedDelta(key_heads=2, value_heads=4, head_dim=16, value_dim=24),
        GatedDelta(key_heads=4, value_heads=4, head_dim=20, value_dim=16), KDA(heads=4, head_dim=24),
    ]),
)
def test_activation_bytes_within_a_fifth(spec, numerics):
    tokens = 320
    declared = spec.cost(64, At(tokens, numerics.itemsize)).activation_bytes * tokens
    measured = kept_bytes(spec, numerics, tokens)
    print(f"{spec.kind}: declared {declared:,.0f}, measured {measured:,} ({declared / measured:.2f})")
    assert declared == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("spec", params(MIXERS))
@torch.no_grad()
def test_state_is_fp32_under_bf16(spec):
    """After hundreds of decoding steps the state is near that of fp64."""
    layer = Layer.parse({"attention": spec, "feed_forward": DENSE})
    exact = model_spec(layer, width=WIDTH).build(seed=3)
    rounded = model_spec(layer, width=WIDTH).build(BF16(), seed=3)
    tokens_T, states = random_tokens(260), []
    for model in (exact.double(), rounded):
        memory = model.memory(1)
        run(model, tokens_T[:100], [100], memory)
        for token_T in tokens_T[100:].split(1):
            run(model, token_T, [1], memory)
        states.append(memory.layers[0].part("memory", RecurrentState).now[0])
    assert states[1].dtype == torch.float32
    assert (states[1].double() - states[0]).norm() < 0.03 * states[0].norm()


@pytest.mark.parametrize("spec", params(MIXERS[::2]))
def test_recomputed_blocks_give_the_same_gradients(spec):
    """The mixer computes its chunks again in the backward; so may the whole block around it."""
    model = copy.deepcopy(built(spec, None))
    tokens_T, stream, found = random_tokens(30), Stream.of_lengths([19, 11]), []
    for recompute in (False, True):
        model.zero_grad()
        model.recompute = recompute
        model.logits(model(tokens_T, stream).hidden_TD).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for one, other in zip(*found, strict=True):
        close(one, other, 1e-12)


@pytest.mark.parametrize("spec", params(MIXERS))
@torch.no_grad()
def test_undone_tokens_leave_taps_and_state(spec):
    """After a rollback the past rows are, bit for bit, and the state is near, those of a memory that never saw more."""
    model, tokens_T = built(spec, None), random_tokens(16)
    memory, other = model.memory(1, undo=3), model.memory(1, undo=3)
    run(model, tokens_T[:9], [9], memory)
    run(model, tokens_T[9:12], [3], memory)
    memory.rollback(3)
    run(model, tokens_T[:9], [9], other)
    taps = spec.taps - 1
    for a, b in zip(memory.layers, other.layers, strict=True):
        assert isinstance(a, JointState) and isinstance(b, JointState)
        rows = [state.part("past", RowState).sequence(0)[0][-taps:] for state in (a, b)]
        assert len(rows[0]) == taps and torch.equal(*rows)
        close(*(state.part("memory", RecurrentState).now[0] for state in (a, b)), 1e-13)
    close(run(model, tokens_T[9:], [7], memory), run(model, tokens_T, [16])[9:])
