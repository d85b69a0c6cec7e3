"""FP8 files with scales by block: restored exactly, edges included (FP8-5), cast again to the same bytes (FP8-9),
and every fault of a scale refused by name (HF-3, HF-5).
"""

import pytest
import torch
from test_mtp_files import CONFIG, released
from torch import Tensor

from sextant.convert import import_weights, spec_from_hf
from sextant.convert.scaled import SCALE, Restored, restored, scale_problems
from sextant.core.errors import CheckpointError, UsageError
from sextant.kernels.fp8 import blocks

QUANTISED = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
}
ODD = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"


def lowered(disk: dict[str, Tensor], power_of_two: bool = False) -> dict[str, Tensor]:
    """The file with its hidden matrices in FP8, as the release holds them."""
    made = {}
    for name, tensor in disk.items():
        if tensor.ndim == 2 and "proj" in name and "eh_proj" not in name:
            scaled = blocks(tensor, power_of_two=power_of_two)
            made |= {name: scaled.values, name + SCALE: scaled.scale}
        else:
            made[name] = tensor.bfloat16() if tensor.ndim == 2 else tensor
    return made


def by_loops(values: Tensor, scale: Tensor) -> Tensor:
    """One number at a time."""
    out = torch.empty(values.shape)
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            out[row, column] = values[row, column].float() * scale[row // 128, column // 128]
    return out


@pytest.mark.parametrize(("rows", "columns", "expected"), [(576, 7168, [5, 56]), (128, 256, [1, 2]), (1, 1, [1, 1])])
def test_fp8_5_shapes_of_scales_with_short_edges(rows, columns, expected):
    scaled = blocks(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)))
    assert list(scaled.scale.shape) == expected
    assert not list(scale_problems({"x": scaled.values, "x" + SCALE: scaled.scale}))


def test_fp8_5_edges_are_restored_by_the_scale_of_their_block():
    values = torch.randn(130, 257, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3, generator=torch.Generator().manual_seed(2)) + 0.1
    assert torch.equal(restored(values, scale), by_loops(values, scale))


SHAPES = [((300, 200), 1.0), ((128, 128), 1e-3), ((5, 700), 30.0), ((1000, 130), 0.02)]


@pytest.mark.parametrize(("shape", "std"), SHAPES)
def test_fp8_9_cast_again_gives_the_same_bytes_and_scales(shape, std):
    first = blocks(std * torch.randn(shape, generator=torch.Generator().manual_seed(3)))
    again = blocks(restored(first.values, first.scale))
    assert torch.equal(first.values.view(torch.uint8), again.values.view(torch.uint8))
    assert torch.equal(first.scale, again.scale)


@pytest.mark.parametrize(("shape", "std"), SHAPES)
def test_powers_of_two_cast_again_give_the_same_numbers(shape, std):
    """Not the same bytes: a largest value that rounded down to half the range is given half the scale."""
    first = blocks(std * torch.randn(shape, generator=torch.Generator().manual_seed(3)), power_of_two=True)
    numbers = restored(first.values, first.scale)
    assert torch.equal(blocks(numbers, power_of_two=True).numbers(), numbers)


def test_scales_are_multipliers():
    values = torch.ones(2, 2).to(torch.float8_e4m3fn)
    assert torch.equal(restored(values, torch.full((1, 1), 0.25)), torch.full((2, 2), 0.25))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_hf_3_an_fp8_file_is_its_restored_twin(power_of_two):
    """Experts, attention and prediction modules; what is not FP8 comes through as it is."""
    disk = lowered(released(), power_of_two)
    assert sum(name.endswith(SCALE) for name in disk) > 40
    spec = spec_from_hf({**CONFIG, "quantization_config": QUANTISED}, mtp=True)
    model, twin = spec.build(seed=2), spec.build(seed=3)
    import_weights(model, disk, "deepseek_v3")
    import_weights(twin, dict(Restored(disk)), "deepseek_v3")
    original = spec.build(seed=4)
    import_weights(original, released(), "deepseek_v3")
    for (name, got), (_, want) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(got, want), name
    pairs = zip(model.named_parameters(), original.parameters(), strict=True)
    off = {name: ((got - want).abs().max() / want.abs().max()).item() for (name, got), want in pairs}
    assert 0 < max(off.values()) <= (2 if power_of_two else 1) * 16 / 448 * 1.001


def test_a_file_with_modules_fills_a_model_without():
    model = spec_from_hf({**CONFIG, "quantization_config": QUANTISED}).build(seed=2)
    disk = lowered(released())
    import_weights(model, disk, "deepseek_v3")
    assert torch.equal(model.blocks[0].attention.kv.kv_a.weight, restored(disk[ODD], disk[ODD + SCALE]))


FAULTS = [
    ({ODD + SCALE: None}, rf"{ODD}{SCALE} got nothing, expected \[1, 1\]"),
    ({ODD + SCALE: torch.ones(2, 1)}, r"got \[2, 1\], expected \[1, 1\]"),
    ({ODD + SCALE: torch.zeros(1, 1)}, "not above 0 and finite"),
    ({ODD + SCALE: torch.full((1, 1), float("nan"))}, "not above 0 and finite"),
    ({ODD: torch.zeros(7, 16)}, r"torch.float32 beside it, expected an FP8 matrix"),
    ({"model.strange.weight" + SCALE: torch.ones(1, 1)}, r"model\.strange.* got None beside it"),
]


@pytest.mark.parametrize(("change", "match"), FAULTS)
def test_hf_5_faults_of_scales_are_named_and_nothing_is_changed(change, match):
    model = spec_from_hf(CONFIG, mtp=True).build(seed=2)
    before = [parameter.clone() for parameter in model.parameters()]
    disk = {name: tensor for name, tensor in (lowered(released()) | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=match):
        import_weights(model, disk, "deepseek_v3")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("field", "value"),
    [("quant_method", "gptq"), ("fmt", "e5m2"), ("weight_block_size", [64, 64]), ("bits", 4), ("scale_fmt", "log")],
)
def test_another_kind_of_file_is_refused_by_field(field, value):
    with pytest.raises(UsageError, match=f"quantization_config: {field}"):
        spec_from_hf({**CONFIG, "quantization_config": {**QUANTISED, field: value}})


def test_the_fields_of_released_files_are_understood():
    more = {"scale_fmt": "ue8m0", "modules_to_not_convert": ["lm_head"]}
    assert spec_from_hf({**CONFIG, "quantization_config": {**QUANTISED, **more}}) == spec_from_hf(CONFIG)
