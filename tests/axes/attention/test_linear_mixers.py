"""What all linear mixers promise beyond the contract suite: their definition in loops, their costs, their precision."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from cases import DENSE, built, close, examples, kept_bytes, model_spec, params, random_tokens, run
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sextant.axes.attention import GLA, TABLE, Lightning, Mixer, RetNet
from sextant.axes.kv import RoPE
from sextant.axes.numerics import BF16, FP32
from sextant.core.cost import At
from sextant.core.state import RecurrentState
from sextant.core.stream import Stream
from sextant.model.spec import Layer

WIDTH = 12
MIXERS = [example for example in examples(TABLE) if isinstance(example, Lightning | RetNet | GLA)]


def filled(spec: Mixer, width: int = WIDTH, seed: int = 0):
    torch.manual_seed(seed)
    module = spec.build(width, FP32()).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def retained(q_TK: Tensor, k_TK: Tensor, v_TV: Tensor, decay_TK: Tensor) -> Tensor:
    """One head by the definition, with sums over pairs: ``o_t = sum_s (q_t . prod_(s < r <= t) decay_r k_s) v_s``."""
    rows = []
    for t in range(len(q_TK)):
        row = torch.zeros_like(v_TV[0])
        for s in range(t + 1):
            row = row + (q_TK[t] * decay_TK[s + 1 : t + 1].prod(0) * k_TK[s]).sum() * v_TV[s]
        rows.append(row)
    return torch.stack(rows)


def rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return gain * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def slope(head: int, heads: int) -> float:
    """ALiBi's (2108.12409), head 1, 2, ...: those of the power of 2 below, then every second of the one above."""
    below = 2 ** math.floor(math.log2(heads))
    return 2 ** (-8 * head / below) if head <= below else 2 ** (-8 * (2 * (head - below) - 1) / (2 * below))


def own(head: int, width: int) -> Tensor:
    """The rows of a head."""
    return head * width + torch.arange(width)


def lightning_by_hand(spec: Lightning, module, x_TD: Tensor) -> Tensor:
    heads = []
    for h in range(spec.heads):
        rows = own(h, 3 * spec.head_dim)
        q, k, v = F.silu(x_TD @ module.qkv.weight[rows].t()).chunk(3, dim=-1)
        heads.append(retained(q, k, v, torch.full_like(k, math.exp(-spec.fade * slope(h + 1, spec.heads)))))
    gain = module.norm.gain + spec.norm.unit_offset
    normed = rms(torch.cat(heads, -1), gain, spec.norm.eps)
    return (normed * (x_TD @ module.gate.weight.t()).sigmoid()) @ module.o.weight.t()


def rotated(x_TK: Tensor) -> Tensor:
    """Channels 2i and 2i + 1 as one complex number, turned by ``10000^(-2i / K)`` per position (xPos without decay)."""
    tokens, width = x_TK.shape
    angle = torch.arange(tokens)[:, None] * 10_000.0 ** (-torch.arange(0, width, 2).double() / width)
    pairs = torch.view_as_complex(x_TK.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def retnet_by_hand(spec: RetNet, module, x_TD: Tensor) -> Tensor:
    heads = []
    for h in range(spec.heads):
        keys, values = own(h, spec.head_dim), own(h, spec.value_dim)
        q, k = x_TD @ module.q.weight[keys].t(), x_TD @ module.k.weight[keys].t() / math.sqrt(spec.head_dim)
        if isinstance(spec.position, RoPE):
            q, k = rotated(q), rotated(k)
        o = retained(q, k, x_TD @ module.v.weight[values].t(), torch.full_like(k, 1 - 2.0 ** (-5 - h)))
        heads.append((o - o.mean(-1, keepdim=True)) / (o.var(-1, unbiased=False, keepdim=True) + spec.eps).sqrt())
    return (torch.cat(heads, -1) * F.silu(x_TD @ module.gate.weight.t())) @ module.o.weight.t()


def gla_by_hand(spec: GLA, module, x_TD: Tensor) -> Tensor:
    heads = []
    logits = x_TD @ module.decay_down.weight.t() @ module.decay_up.weight.t() + module.decay_up.bias
    decay = logits.sigmoid() ** (1 / spec.temperature)
    for h in range(spec.heads):
        keys, values = own(h, spec.head_dim), own(h, spec.value_dim)
        q, k = x_TD @ module.q.weight[keys].t() / math.sqrt(spec.head_dim), x_TD @ module.k.weight[keys].t()
        o = retained(q, k, x_TD @ module.v.weight[values].t(), decay[:, keys])
        heads.append(rms(o, module.norm.gain, spec.norm.eps))
    return (torch.cat(heads, -1) * F.silu(x_TD @ module.gate.weight.t())) @ module.o.weight.t()


BY_HAND = {"lightning": lightning_by_hand, "retnet": retnet_by_hand, "gla": gla_by_hand}


@pytest.mark.parametrize("spec", params(MIXERS))
def test_mixer_by_definition(spec):
    """Heads apart, pairs apart; LA-10: norm over all heads, then the gate, then the projection."""
    module, x_TD = filled(spec), torch.randn(11, WIDTH, dtype=torch.float64, requires_grad=True)
    got_TD, want_TD = module(x_TD, Stream.of_lengths([11]), None), BY_HAND[spec.kind](spec, module, x_TD)
    close(got_TD, want_TD, 1e-7 if spec.kind != "gla" else 1e-11)  # fixed decays are kept in fp32
    upstream_TD = torch.randn_like(got_TD)
    leaves = [x_TD, *module.parameters()]
    for got, want in zip(*(torch.autograd.grad(y, leaves, upstream_TD) for y in (got_TD, want_TD)), strict=True):
        close(got, want, 1e-6)


@pytest.mark.parametrize("spec", params(MIXERS))
def test_la_5_documents_around_the_chunk(spec):
    """Lengths 1, C - 1, C, C + 1 and twos of them, packed against one by one; forward, and backward by sums."""
    module, chunk = filled(spec), min(spec.chunk, 9)
    module.spec = spec.replace(chunk=chunk)
    lengths = [1, chunk - 1, chunk, chunk + 1, chunk + 1, 2 * chunk, 1]
    x_TD = torch.randn(sum(lengths), WIDTH, dtype=torch.float64)
    packed_TD = module(x_TD, Stream.of_lengths(lengths), None)
    separate_TD = torch.cat([module(part, Stream.of_lengths([len(part)]), None) for part in x_TD.split(lengths)])
    close(packed_TD, separate_TD, 1e-11)
    got, want = (
        torch.autograd.grad(y.square().sum(), list(module.parameters())) for y in (packed_TD, separate_TD)
    )
    for a, b in zip(got, want, strict=True):
        close(a, b, 1e-10)


@pytest.mark.parametrize("spec", params(MIXERS))
def test_la_6_a_padded_batch_equals_its_rows(spec):
    """Right padding neither adds nor decays: rows of a padded batch are those of the sequences alone."""
    model, tokens_BT = built(spec, None), random_tokens(22).view(2, 11)
    with torch.no_grad():
        logits_BTP = model.batch_logits(tokens_BT, [11, 5])
    close(logits_BTP[1, :5], run(model, tokens_BT[1, :5], [5]))


@pytest.mark.parametrize("spec", params(MIXERS))
@pytest.mark.parametrize("tokens", [1, 6, 24, 65])
def test_flops_are_those_of_the_counter(spec, tokens):
    """Products by the machine. Not counted by us: the upper triangle in a chunk that a fixed decay forms and drops, and
    a channel's decay in odd halves; not by it: a single token's outer product, and pairs of a token with itself.
    """
    module = spec.build(WIDTH, FP32())
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.randn(tokens, WIDTH), Stream.of_lengths([tokens]), None)
    drawn, declared = counter.get_total_flops(), spec.cost(WIDTH, At(tokens, itemsize=4)).flops * tokens
    heads, k_dim, v_dim = spec.state().shape
    pair, whole, rest = 2 * heads * (k_dim + v_dim), *divmod(tokens, spec.chunk)
    if tokens == 1:
        declared -= pair + 2 * heads * k_dim * v_dim
    elif spec.kind == "gla":
        declared -= pair * tokens
    else:
        declared += pair * (whole * spec.chunk * (spec.chunk - 1) + rest * (rest - 1)) // 2
    if spec.kind == "gla" and spec.chunk & (spec.chunk - 1):
        assert declared <= drawn < 1.3 * declared
    else:
        assert drawn == declared


@pytest.mark.parametrize("numerics", [FP32(), BF16()], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "spec",
    params([
        Lightning(heads=4, head_dim=24), RetNet(heads=4, head_dim=16, value_dim=32),
        GLA(heads=4, head_dim=16, value_dim=24),
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
    """After hundreds of decoding steps the state is near that of fp64; one in bf16 would have stopped to add up."""
    layer = Layer.parse({"attention": spec, "feed_forward": DENSE})
    exact = model_spec(layer, width=WIDTH).build(seed=3)
    rounded = model_spec(layer, width=WIDTH).build(BF16(), seed=3)
    tokens_T, states = random_tokens(300), []
    for model in (exact.double(), rounded):
        memory = model.memory(1)
        run(model, tokens_T[:100], [100], memory)
        for token_T in tokens_T[100:].split(1):
            run(model, token_T, [1], memory)
        states.append(memory.layers[0].now[0])
    assert states[1].dtype == torch.float32
    assert (states[1].double() - states[0]).norm() < 0.02 * states[0].norm()


@pytest.mark.parametrize("spec", params(MIXERS[:1] + MIXERS[-1:]))
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


@torch.no_grad()
def test_a_fork_copies_the_state_and_not_the_model():
    """What a state keeps to redo tokens must not drag the layer's weights along."""
    spec = MIXERS[0]
    model = built(spec, None)
    memory = model.memory(1, undo=2)
    run(model, random_tokens(9), [9], memory)
    state, other = memory.layers[0], memory.fork().layers[0]
    assert isinstance(state, RecurrentState) and isinstance(other, RecurrentState)
    assert other.fold is state.fold and other.now[0] is not state.now[0]
    cells = [cell.cell_contents for cell in state.fold.__closure__]
    assert not any(isinstance(cell, torch.nn.Module) for cell in cells)
