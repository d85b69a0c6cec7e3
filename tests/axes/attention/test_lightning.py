"""Lightning attention's own properties (spec minimax-01, section 3): slopes, shards of heads, the size of its state."""

from __future__ import annotations

import math

import pytest
import torch
from cases import close

from sextant.axes.attention import Lightning
from sextant.axes.attention.lightning import fade
from sextant.axes.numerics import FP32
from sextant.core.cost import At
from sextant.core.stream import Stream
from sextant.recipes import minimax_text_01

WIDTH = 10


def slopes(heads: int, factor: float = 1.0) -> list[float]:
    return (-Lightning(heads=heads, head_dim=2, fade=factor).build(4, FP32()).log_decay_H).tolist()


def test_la_8_slopes_of_64_heads_in_80_layers():
    """Half-lives as the spec prints them: layer 0 from 0.76 to 177 tokens, layer 78 from 60 to 14,007."""
    assert slopes(64) == pytest.approx([2 ** (-h / 8) for h in range(1, 65)], rel=1e-7)
    half_lives = {
        layer: [math.log(2) / s for s in (slopes(64, fade(layer, 80))[0], slopes(64, fade(layer, 80))[-1])]
        for layer in (0, 40, 78)
    }
    assert half_lives[0] == pytest.approx([0.76, 177], rel=0.01)
    assert half_lives[40] == pytest.approx([1.53, 359], rel=0.01)
    assert half_lives[78] == pytest.approx([60, 14_007], rel=0.01)


def test_la_8_other_numbers_of_heads_follow_alibi():
    """12 heads: the 8 of a power of 2, then every second of 16."""
    eight, sixteen = [2.0**-h for h in range(1, 9)], [2 ** (-h / 2) for h in range(1, 17)]
    assert slopes(12) == pytest.approx(eight + sixteen[0:8:2], rel=1e-7)


def test_la_8_layers_fade_to_almost_nothing():
    factors = [fade(layer, 80) for layer in range(80)]
    assert factors[0] == 1 + 1e-5 and factors[78] == pytest.approx(0.01267, abs=1e-5)
    assert factors[79] == pytest.approx(1e-5, rel=1e-6)
    assert fade(0, 1) == 1 + 1e-5
    mixers = [layer.attention for layer in minimax_text_01.paper().model.layers]
    assert [mixer.fade for mixer in mixers if mixer.kind == "lightning"] == [
        factor for layer, factor in enumerate(factors) if layer % 8 != 7
    ]


@pytest.mark.parametrize("shards", [2, 4])
def test_la_11_shards_of_heads_need_one_sum(shards):
    """Heads apart, the sum of squares shared, output projections added: the whole layer."""
    spec, tokens = Lightning(heads=4, head_dim=6, fade=0.4, chunk=4), 13
    torch.manual_seed(0)
    whole, x_TD = spec.build(WIDTH, FP32()).double(), torch.randn(tokens, WIDTH, dtype=torch.float64)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter)
    parts, heads = [], spec.heads // shards
    for shard in range(shards):
        part = spec.replace(heads=heads).build(WIDTH, FP32()).double()
        rows = slice(shard * heads * spec.head_dim, (shard + 1) * heads * spec.head_dim)
        part.qkv.weight.data = whole.qkv.weight.data[3 * rows.start : 3 * rows.stop]
        part.gate.weight.data, part.o.weight.data = whole.gate.weight.data[rows], whole.o.weight.data[:, rows]
        part.norm.gain.data = whole.norm.gain.data[rows]
        part.log_decay_H = whole.log_decay_H[shard * heads : (shard + 1) * heads]
        parts.append(part)

    local = []  # what each shard's norm sees
    for part in parts:
        part.norm.register_forward_pre_hook(lambda module, args: local.append(args[0]))
        part(x_TD, Stream.of_lengths([tokens]), None)
    squares = sum(o.square().sum(-1, keepdim=True) for o in local)  # the all-reduce
    scale = (squares / spec.inner + spec.norm.eps).rsqrt()
    shared = [
        part.o(part.norm.gain * o * scale * part.gate(x_TD).sigmoid()) for part, o in zip(parts, local, strict=True)
    ]
    close(sum(shared), whole(x_TD, Stream.of_lengths([tokens]), None), 1e-12)


def test_state_of_the_paper_is_four_mebibytes_at_every_length():
    spec = Lightning(heads=64, head_dim=128)
    assert {spec.cost(6144, At(tokens)).state_bytes for tokens in (1, 10**6)} == {4 * 2**20}


def test_core_flops_of_the_paper():
    """Spec minimax-01, section 2.3: 8.4 MFLOP per token and layer at blocks of 256, whatever the length."""
    spec = Lightning(heads=64, head_dim=128, chunk=256)
    matrices = 2 * 5 * 6144 * 8192
    for tokens in (8192, 2**20):
        assert spec.cost(6144, At(tokens)).flops - matrices == pytest.approx(8.4e6, rel=0.01)


def test_work_per_token_does_not_grow():
    spec = Lightning(heads=4, head_dim=32)
    assert spec.cost(128, At(640)).flops == spec.cost(128, At(6400)).flops
