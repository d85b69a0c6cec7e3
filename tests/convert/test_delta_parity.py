"""Gated DeltaNet of Qwen3-Next and KDA of Kimi Linear against transformers in fp32, layer by layer, weights by map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracle_hf import Case, build_theirs, gap, gradients_on_disk, saved
from torch import Tensor, nn

from sextant.axes.attention import KDA, GatedDelta, Mixer
from sextant.axes.numerics import FP32
from sextant.axes.stability import RMSNorm
from sextant.convert.maps import GATED_DELTA, Row
from sextant.convert.maps import KDA as KDA_MAP
from sextant.core.stream import Stream

CLOSE = 1e-5
WIDTH, LENGTH = 48, 75  # beyond their chunk of 64


@dataclass(frozen=True)
class Layer:
    family: str
    config: dict[str, Any]
    spec: Mixer
    rows: tuple[Row, ...]
    at: str


LAYERS = [
    Layer(
        "qwen3_next",
        {
            "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 12,
            "linear_value_head_dim": 10, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
        },
        GatedDelta(key_heads=2, value_heads=6, head_dim=12, value_dim=10, norm=RMSNorm(eps=1e-5), chunk=9),
        GATED_DELTA,
        "linear_attn",
    ),
    Layer(
        "kimi_linear",
        {
            "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "linear_num_heads": 3,
            "linear_head_dim": 12, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
            "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
            "mlp_layer_types": ["dense", "dense"],
        },
        KDA(heads=3, head_dim=12, chunk=9),
        KDA_MAP,
        "self_attn",
    ),
]


@dataclass(frozen=True)
class Both:
    case: Layer
    theirs: Any
    ours: nn.Module
    disk: dict[str, Tensor]

    @property
    def layer(self) -> nn.Module:
        return getattr(self.theirs.model.layers[0], self.case.at)


def named(row: Row) -> tuple[str, list[str]]:
    """Our parameter's name within the mixer, and theirs on disk in layer 0."""
    theirs = (row.theirs,) if isinstance(row.theirs, str) else row.theirs
    return row.ours.removeprefix("blocks.{i}.attention.mixer."), [name.format(i=0) for name in theirs]


def taken(rows: tuple[Row, ...], disk: dict[str, Tensor]) -> dict[str, Tensor]:
    """A mixer's tensors from those on disk."""
    return {
        ours: row.move.join([disk[name] for name in theirs], len(theirs))
        for row, (ours, theirs) in ((row, named(row)) for row in rows)
    }


@pytest.fixture(scope="module", params=LAYERS, ids=lambda case: case.family)
def both(request, tmp_path_factory) -> Both:
    case = request.param
    theirs = build_theirs(Case(case.family, case.config))
    for name, parameter in theirs.named_parameters():
        if name.endswith("A_log"):  # half-lives from less than a token to tens of them
            nn.init.uniform_(parameter, -4.0, 0.0)
    disk = saved(theirs, tmp_path_factory.mktemp(case.family))
    ours = case.spec.build(WIDTH, FP32())
    ours.load_state_dict(taken(case.rows, disk))
    return Both(case, theirs, ours, disk)


def test_outputs_and_gradients(both: Both, tmp_path):
    """Of the input and of every parameter, for a batch of two sequences."""
    torch.manual_seed(2)
    x_BTD, upstream_BTD = torch.randn(2, 2, LENGTH, WIDTH)
    x_BTD.requires_grad_()
    want_BTD = both.layer(x_BTD)
    got_BTD = both.ours(x_BTD.flatten(0, 1), Stream.of_lengths([LENGTH] * 2), None).unflatten(0, (2, -1))
    assert gap(got_BTD, want_BTD) < CLOSE
    both.theirs.zero_grad()
    want_BTD.backward(upstream_BTD, inputs=[*both.layer.parameters()], retain_graph=True)
    expected = taken(both.case.rows, gradients_on_disk(both.theirs, tmp_path))
    expected["x"] = torch.autograd.grad(want_BTD, x_BTD, upstream_BTD)[0]
    leaves = {"x": x_BTD, **dict(both.ours.named_parameters())}
    got = dict(zip(leaves, torch.autograd.grad(got_BTD, list(leaves.values()), upstream_BTD), strict=True))
    gaps = {name: gap(got[name], expected[name]) for name in leaves}
    print(f"largest gap of a gradient: {max(gaps.values()):.1e}")
    assert max(gaps.values()) < CLOSE, max(gaps.items(), key=lambda item: item[1])


@torch.no_grad()
def test_every_parameter_is_felt(both: Both):
    """The comparison above would see a parameter that is a tenth off."""
    torch.manual_seed(3)
    x_TD, stream = torch.randn(LENGTH, WIDTH), Stream.of_lengths([LENGTH])
    want_TD = both.ours(x_TD, stream, None)
    for name, parameter in both.ours.named_parameters():
        right = parameter.clone()
        parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
        assert gap(both.ours(x_TD, stream, None), want_TD) > 10 * CLOSE, name
        parameter.copy_(right)


def test_the_map_is_complete_and_goes_back(both: Both):
    """Every tensor of theirs in this layer, bit for bit."""
    back, state = {}, both.ours.state_dict()
    for row in both.case.rows:
        ours, theirs = named(row)
        back.update(zip(theirs, row.move.split(state[ours], len(theirs)), strict=True))
    expected = {name: x for name, x in both.disk.items() if name.startswith(f"model.layers.0.{both.case.at}.")}
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], expected[name]) for name in back)
