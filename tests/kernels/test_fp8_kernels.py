"""FP8 casts bit for bit against a scalar reference; scales of tiles and blocks; products (FP8-1 to FP8-6)."""

import bisect
import math
import os
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sextant.kernels import fp8
from sextant.kernels.fp8 import (
    E4M3,
    E5M2,
    GRADIENT_FLOOR,
    Scaled,
    blocks,
    columns_product,
    quantise,
    remembered,
    rows_product,
    tiles,
    tiles_down,
    whole,
)
from sextant.kernels.fp8.reference import columns_reference, rows_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BITS = {"e4m3": (3, 7), "e5m2": (2, 15)}
"""Digits of the mantissa, and the bias of the exponent."""
FORMATS = [pytest.param(form, id=form.name) for form in (E4M3, E5M2)]


class Scalar:
    """One format by its definition: every finite value by its code; rounding to the nearest of them, ties to even."""

    def __init__(self, form):
        self.mantissa, self.bias = BITS[form.name]
        codes = range(127 if form is E4M3 else 124)  # what follows is NaN in E4M3, infinity and NaN in E5M2
        self.values = [self.value(code) for code in codes]
        self.nan = 0x7F

    def value(self, code: int) -> float:
        power, part = code >> self.mantissa, code & (1 << self.mantissa) - 1
        if power == 0:
            return math.ldexp(part, 1 - self.bias - self.mantissa)
        return math.ldexp((1 << self.mantissa) + part, power - self.bias - self.mantissa)

    def cast(self, x: float) -> tuple[int, bool]:
        """Byte, and whether rounding to nearest would have passed the largest value."""
        sign = 0x80 if math.copysign(1.0, x) < 0 else 0
        if math.isnan(x):
            return self.nan, False
        high = bisect.bisect_left(self.values, abs(x))
        if high == len(self.values):
            last, step = self.values[-1], self.values[-1] - self.values[-2]
            over = abs(x) > last + step / 2 or (abs(x) == last + step / 2 and len(self.values) % 2 == 0)
            return sign | high - 1, over
        if self.values[high] == abs(x):
            return sign | high, False
        up, down = self.values[high] - abs(x), abs(x) - self.values[high - 1]
        return sign | (high if up < down or (up == down and high % 2 == 0) else high - 1), False


def adversarial(form) -> Tensor:
    """Every value, every midpoint and their fp32 neighbours, both signs; zeros, infinities, NaN, the ends of fp32."""
    values = torch.tensor(Scalar(form).values)
    ends = torch.tensor([form.limit, 464.0, 480.0, 61440.0, 65536.0])
    edges = torch.cat([values, (values[1:] + values[:-1]) / 2, ends])
    inf = torch.tensor(math.inf)
    around = torch.cat([edges, torch.nextafter(edges, inf), torch.nextafter(edges, -inf)])
    odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1.2e-38, 3.4e38, -3.4e38])
    return torch.cat([around, -around, odd])


def many(form) -> Tensor:
    spread = torch.randn(100_000) * torch.exp2(torch.randint(-20, 18, (100_000,)).float())
    return torch.cat([spread, adversarial(form)])


@pytest.mark.parametrize("scale", [1.0, 0.37, 1024.0])
@pytest.mark.parametrize("form", FORMATS)
def test_cast_equals_the_scalar_reference_bit_for_bit(form, scale):
    x, scalar = many(form), Scalar(form)
    got, saturated = quantise(x, scale, form)
    want = [scalar.cast(value) for value in (x * scale).tolist()]
    codes = torch.tensor([code for code, _ in want], dtype=torch.uint8)
    nan = x.isnan()
    assert torch.equal(got.view(torch.uint8)[~nan], codes[~nan])
    assert got.float()[nan].isnan().all() and nan.any()
    assert saturated.item() == sum(over for _, over in want) > 0
    assert got.float()[~nan].isfinite().all()


@pytest.mark.parametrize("form", FORMATS)
def test_declared_limits_are_those_of_the_format(form):
    values = Scalar(form).values
    assert form.max == values[-1] == torch.finfo(form.dtype).max
    assert form.min_subnormal == values[1] and form.min_normal == torch.finfo(form.dtype).smallest_normal


@pytest.mark.parametrize(("form", "digits"), [(E4M3, 4), (E5M2, 3)], ids=["e4m3", "e5m2"])
def test_relative_error_of_normals(form, digits):
    """At most 2^-4 and 2^-3 (spec mai-base-1 12.2)."""
    x = torch.randn(20_000) * 20
    x = x[(x.abs() >= form.min_normal) & (x.abs() <= form.max)]
    error = (quantise(x, 1.0, form)[0].float() - x).abs() / x.abs()
    assert 0.85 * 2.0**-digits < error.max() <= 2.0**-digits


def test_fp8_1_error_of_a_tile():
    """Half a step of the top binade: amax * 16 / 448."""
    x = torch.randn(64, 512)
    error = (tiles(x).numbers() - x).abs().unflatten(1, (-1, 128)).amax(-1)
    amax = x.abs().unflatten(1, (-1, 128)).amax(-1)
    assert (error <= amax * 16 / 448 * (1 + 1e-6)).all()
    assert (error / amax).max() > 0.034


def others_error(scaled: Scaled, x: Tensor) -> float:
    """Mean relative error outside the outlier's tile."""
    return ((scaled.numbers() - x).abs().mean(0) / x.abs().mean(0))[128:].mean().item()


@pytest.mark.parametrize(("outlier", "loses"), [(1e2, False), (1e5, True), (1e7, True)])
def test_fp8_2_tiles_against_one_scale(outlier, loses):
    """E4M3 floats, so a mild outlier costs nothing; a large one costs all other channels under one scale only."""
    x = torch.randn(256, 256)
    x[:, 3] *= outlier
    tiled, (one, saturated) = tiles(x), whole(x, E4M3.max / x.abs().max(), E4M3)
    assert saturated == 0 and others_error(tiled, x) < 0.03
    assert (others_error(one, x) > 2 * others_error(tiled, x)) is loses
    assert outlier < 1e7 or others_error(one, x) > 0.99


@pytest.mark.parametrize("power_of_two", [False, True])
def test_fp8_3_groups_of_zeros(power_of_two):
    x = torch.randn(256, 256)
    x[:128, :128] = 0
    for scaled in (tiles(x, power_of_two=power_of_two), blocks(x, power_of_two=power_of_two)):
        assert scaled.scale.isfinite().all() and (scaled.scale > 0).all()
        assert (scaled.numbers()[:128, :128] == 0).all() and (scaled.numbers()[128:] != 0).any()


def test_floor_of_gradients():
    """A scale never below 1e-4 / 448 would round a small gradient to zero."""
    x = torch.randn(4, 128) * 1e-11
    assert (tiles(x).numbers() == 0).all()
    torch.testing.assert_close(tiles(x, floor=GRADIENT_FLOOR).numbers(), x, rtol=0.07, atol=1e-13)


@pytest.mark.parametrize(("rows", "columns"), [(576, 7168), (1, 1), (129, 127), (5, 300)])
def test_fp8_5_short_edges(rows, columns):
    x = torch.randn(rows, columns)
    block, tile = blocks(x), tiles(x)
    assert block.scale.shape == (-(-rows // 128), -(-columns // 128)) and tile.scale.shape == (rows, -(-columns // 128))
    for scaled in (block, tile):
        assert scaled.values.shape == x.shape and scaled.values.is_contiguous()
        again = blocks(scaled.numbers()) if scaled is block else tiles(scaled.numbers())
        assert torch.equal(again.numbers(), scaled.numbers())
    edge = x[128 * (rows // 128) :, 128 * (columns // 128) :]
    if edge.numel():
        assert block.scale[-1, -1] == edge.abs().max().clamp_min(1e-4) / 448


def test_fp8_5_scale_shape_of_the_latent_projection():
    assert blocks(torch.randn(576, 7168)).scale.shape == (5, 56)


def test_fp8_6_powers_of_two():
    """Every scale is one, none is too small; tiling the other way round adds nothing where exponents suffice."""
    x = (torch.rand(256, 256) * 3 + 0.5) * torch.randn(256, 256).sign()
    first = tiles(x, power_of_two=True)
    assert (torch.frexp(first.scale).mantissa == 0.5).all()
    assert (first.scale >= tiles(x).scale).all() and (first.scale < 2 * tiles(x).scale).all()
    assert torch.equal(tiles(first.numbers().t(), power_of_two=True).numbers().t(), first.numbers())
    plain = tiles(x).numbers()
    assert not torch.equal(tiles(plain.t()).numbers().t(), plain)


def same(a: Scaled, b: Scaled) -> bool:
    return torch.equal(a.values.view(torch.uint8), b.values.view(torch.uint8)) and torch.equal(a.scale, b.scale)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_transposes_are_cast_as_they_lie(power_of_two):
    """Bytes change places, no value does: tiles along rows, blocks and one scale of a transposed view."""
    x = torch.randn(256, 200)
    assert same(fp8.tiles_down(x, power_of_two=power_of_two), tiles(x.t().contiguous(), power_of_two=power_of_two))
    stack = torch.randn(3, 130, 257)
    for view, copy in ((x.t(), x.t().contiguous()), (stack.mT, stack.mT.contiguous())):
        turned = blocks(view, power_of_two=power_of_two)
        assert same(turned, blocks(copy, power_of_two=power_of_two)) and turned.values.is_contiguous()
        turned, count = whole(view, torch.tensor(200.0), E4M3)
        want, count_of_copy = whole(copy, torch.tensor(200.0), E4M3)
        assert same(turned, want) and count == count_of_copy > 0 and turned.values.is_contiguous()


def test_powers_of_two_stay():
    amax = torch.tensor([448.0, 224.0, 448.0 * 2**-20, 449.0])
    assert fp8.restoring(amax, E4M3, 1e-4, power_of_two=True).tolist() == [1.0, 0.5, 2.0**-20, 2.0]


@pytest.mark.parametrize("counts", [[0, 131, 3, 0, 1], [128, 0, 256], [0, 0], [7]], ids=str)
def test_tiles_of_experts_begin_with_their_rows(counts):
    """Each expert's rows tiled down alone, one after another; what is left is zero."""
    x = torch.randn(sum(counts), 40)
    got, start = tiles_down(x, counts_E=torch.tensor(counts)), 0
    assert got.values.shape == (40, 128 * (sum(counts) // 128 + len(counts)))
    for part in x.split(counts):
        want = tiles_down(part)
        stop = start + want.values.shape[1]
        here = Scaled(got.values[:, start:stop], got.scale[:, start // 128 : stop // 128], (1, 128))
        assert same(here, want)
        start = stop
    assert (got.values[:, start:].float() == 0).all()


def state_of(*scales: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.tensor(scales), torch.zeros(len(scales)), torch.zeros(len(scales), dtype=torch.int64)


def test_a_state_notes_what_was_cast():
    """Largest magnitudes over two tensors, counts of both; the other columns stay; unrecorded casts leave no trace."""
    state, first, second = state_of(1.0, 3.0, 0.0), torch.randn(40, 50) * 200, torch.randn(30, 20) * 100
    for x in (first, second):
        remembered(x, E4M3, 1, state, True)
    kept = [part.clone() for part in state]
    remembered(first * 9, E4M3, 1, state, False)
    assert state[1].tolist() == [0.0, first.abs().max().item(), 0.0]
    assert state[2].tolist() == [0, sum(whole(x, state[0][1], E4M3)[1].item() for x in (first, second)), 0]
    assert state[2][1] > 0 and all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))


@pytest.mark.parametrize("form", FORMATS)
def test_without_a_history_the_largest_value_is_the_scale(form):
    x = torch.randn(40, 50) * 1e-6
    got = remembered(x, form, 0, state_of(0.0), True)
    assert same(got, whole(x, form.max / x.abs().max(), form)[0]) and got.values.float().abs().max() == form.max


# --- products -------------------------------------------------------------------------------------------------------


def operands(kind: str, rows: int, matrices: int = 3, width: int = 40, depth: int = 200) -> tuple[Scaled, Scaled]:
    x_ND, weight_EFD = torch.randn(rows, depth), torch.randn(matrices, width, depth)
    if kind == "tiles":
        return tiles(x_ND), blocks(weight_EFD)
    return whole(x_ND, torch.tensor(30.0), E5M2)[0], whole(weight_EFD, torch.tensor(50.0), E4M3)[0]


@pytest.fixture(params=["tiles", "whole"])
def kind(request) -> str:
    return request.param


@pytest.mark.parametrize("counts", [[0, 17, 4], [21, 0, 0], [0, 0, 1], [7, 7, 7]], ids=str)
def test_rows_against_fp64(kind, counts):
    x, weight = operands(kind, sum(counts))
    got = rows_product(x, weight, torch.tensor(counts), torch.float32)
    parts = x.numbers().double().split(counts)
    want = torch.cat([rows @ matrix.double().t() for rows, matrix in zip(parts, weight.numbers(), strict=True)])
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


def test_one_matrix_needs_no_counts(kind):
    x, weight = operands(kind, 9, matrices=1)
    with_counts = rows_product(x, weight, torch.tensor([9]), torch.float32)
    assert torch.equal(rows_product(x, weight, None, torch.float32), with_counts)


@pytest.mark.parametrize("counts", [[1, 0, 2], [3], [0, 0, 1]], ids=str)
def test_columns_against_fp64(counts):
    dy, x = tiles(torch.randn(24, 512)), tiles(torch.randn(40, 512))
    got = columns_product(dy, x, torch.tensor(counts))
    start = 0
    for dw, count in zip(got, counts, strict=True):
        part = slice(128 * start, 128 * (start + count))
        want = dy.numbers()[:, part].double() @ x.numbers()[:, part].double().t()
        torch.testing.assert_close(dw.double(), want, rtol=1e-5, atol=1e-4)
        start += count


@pytest.mark.parametrize("counts", [[0, 17, 4], [33, 0, 0]], ids=str)
def test_scaled_mm_per_matrix(counts):
    """torch's scaled product exists on a CPU for whole tensors: padding, cutting and empty experts."""
    x, weight = operands("whole", sum(counts), width=19, depth=37)
    want = rows_product(x, weight, torch.tensor(counts), torch.float32)
    fp8.only("scaled_mm")
    try:
        got = rows_product(x, weight, torch.tensor(counts), torch.bfloat16)
        assert set(fp8.paths().values()) == {"scaled_mm"}
    finally:
        fp8.only(None)
    torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2 * want.abs().max().item())


def test_bf16_way_is_close():
    """What a GPU without a kernel falls back to, rows and columns, one matrix and several."""
    for many_ in (True, False):
        x, weight = operands("tiles", 20, matrices=3 if many_ else 1)
        assert fp8._fault("bf16", "rows", x, weight, many_) is None
        assert fp8._fault("bf16", "columns", tiles(torch.randn(3, 128)), tiles(torch.randn(3, 128)), many_) is None


@pytest.mark.skipif(INTERPRETED, reason="Triton serves it")
def test_a_way_that_fails_is_named_and_left_out(monkeypatch):
    """As on a GPU where neither library takes the product: two warnings, and the bf16 way; asked once."""
    x, weight = operands("tiles", 20)
    monkeypatch.setattr(fp8, "_chosen", {})
    values = SimpleNamespace(is_cuda=True, device=torch.device("cpu"), dtype=x.values.dtype)
    on_gpu = Scaled(values, x.scale, x.tile)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert fp8._way("rows", on_gpu, weight, True).__name__ == "rows_in_bf16"
    text = [str(one.message) for one in said]
    assert len(text) == 2 and "triton cannot serve" in text[0] and "scaled_mm cannot serve" in text[1]
    assert list(fp8.paths().values()) == ["bf16"]


def test_a_way_that_is_off_is_left_out(monkeypatch):
    x, weight = operands("whole", 20)
    real = fp8._function

    def halved(way: str, what: str):
        return (lambda *args: real("reference", what)(*args) * 0.5) if way == "triton" else real(way, what)

    monkeypatch.setattr(fp8, "_function", halved)
    assert "off by 5.0e-01" in (fp8._fault("triton", "rows", x, weight, True) or "")
    assert fp8._fault("scaled_mm", "rows", x, weight, True) is None


def fourteen_bits(x: Tensor) -> Tensor:
    """Cut to 14 binary digits, as Hopper's fp8 accumulator keeps."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2.0**14).trunc(), exponent - 14)


def accumulated(products_DN: Tensor, promote: int) -> Tensor:
    """Sums over D by 32 at a time in 14 bits, added to an fp32 sum every ``promote``."""
    total = torch.zeros(products_DN.shape[1])
    for part in products_DN.split(promote):
        short = torch.zeros_like(total)
        for step in part.split(32):
            short = fourteen_bits(short + step.sum(0))
        total += short
    return total


def test_fp8_4_promotion_reduces_the_error_of_short_sums():
    x, w = tiles(torch.rand(64, 4096)).numbers(), tiles(torch.rand(64, 4096)).numbers()
    products_DN, want = (x * w).t(), (x * w).double().sum(1)
    long, short = (((accumulated(products_DN, p) - want).abs() / want).max().item() for p in (4096, 128))
    assert short < 0.25 * long and long > 1e-3


# --- Triton's kernels in its interpreter, where there is one ----------------------------------------------------------

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")


def casts():
    return pytest.importorskip("sextant.kernels.fp8.triton_casts")


def wide(form):
    """The format with numbers kept in fp32: the interpreter rounds ties otherwise than devices, so torch rounds."""
    return replace(form, dtype=torch.float32)


def agree(got: Scaled, want: Scaled) -> None:
    values, nan = got.values.to(want.values.dtype), want.values.float().isnan()
    assert got.values.is_contiguous() and values.shape == want.values.shape and got.scale.shape == want.scale.shape
    assert torch.equal(values.float().isnan(), nan)
    assert torch.equal(values.view(torch.uint8)[~nan], want.values.view(torch.uint8)[~nan])
    assert torch.equal(got.scale.nan_to_num(7.0), want.scale.nan_to_num(7.0)) and got.tile == want.tile


def shapes_as_they_lie() -> list[Tensor]:
    """Contiguous and transposed, short edges, stacks; outliers, so that groups differ."""
    x, stack = torch.randn(130, 257), torch.randn(3, 40, 129)
    x[:, 3] *= 1e4
    stack[1] *= 1e-6
    return [x, x.t(), stack, stack.mT, x[:1], x[::3, ::2], torch.zeros(5, 7)]


@interpreted
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("factor", [1.0, 3.7])
def test_triton_whole(form, factor):
    scale = torch.tensor(factor)
    for x in [adversarial(form), *shapes_as_they_lie()]:
        (got, over), (want, count) = casts().whole(x, scale, wide(form)), whole(x, scale, form)
        agree(got, want)
        assert over == count


@interpreted
@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("scale", [0.0, 250.0])
@pytest.mark.parametrize("form", FORMATS)
def test_triton_remembered(form, scale, record):
    """Largest value and count as the reference notes them, from two tensors; NaN and infinity too."""
    odd = [torch.full((3, 5), math.inf), torch.tensor([[1.0, math.nan, -math.inf]])]
    for column, x in enumerate(shapes_as_they_lie() + odd):
        got, want = state_of(*[scale] * 9), state_of(*[scale] * 9)
        for part in (x, x * 2):
            agree(casts().remembered(part, wide(form), column, got, record),
                  remembered(part, form, column, want, record))
        assert all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(got, want, strict=True))
        assert bool(want[1].isnan().any() or want[1].sum() > 0) is (record and bool((x != 0).any()))


@interpreted
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_triton_groups(form, power_of_two):
    odd = torch.randn(4, 300)
    odd[0, 3], odd[1, 140], odd[2, 290] = math.nan, math.inf, -math.inf
    for x in [*shapes_as_they_lie(), odd]:
        for floor in (fp8.FLOOR, GRADIENT_FLOOR):
            agree(casts().tiles(x, wide(form), floor, power_of_two), tiles(x, form, floor, power_of_two))
        agree(casts().blocks(x, wide(form), power_of_two), blocks(x, form, power_of_two))


@interpreted
@pytest.mark.parametrize("counts", [None, [0, 131, 3, 0, 1], [128, 0, 256], [0, 0, 5], [0] * 17 + [130]], ids=str)
def test_triton_tiles_down(counts):
    x = torch.randn(135 if counts is None else sum(counts), 150)
    counts_E = None if counts is None else torch.tensor(counts)
    for form in (E4M3, E5M2):
        agree(casts().tiles_down(x, wide(form), counts_E=counts_E), tiles_down(x, form, counts_E=counts_E))


@interpreted
@pytest.mark.parametrize("counts", [None, [0, 17, 4], [33, 0, 0], [0, 0, 1], [70, 3, 64]], ids=str)
def test_triton_products(kind, counts):
    from sextant.kernels.fp8.triton_kernels import columns_grouped, rows_grouped

    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-4)
    counts_E, matrices = (None, 1) if counts is None else (torch.tensor(counts), 3)
    x, weight = operands(kind, sum(counts or [70]), matrices, width=70, depth=150)
    want = rows_reference(x, weight, counts_E, torch.float32)
    close(rows_grouped(x, weight, counts_E, torch.float32, tile=64), want, atol=1e-4 * want.abs().max().item())
    rows = torch.randn(len(x.values), 90)
    dy, columns = (tiles_down(part, counts_E=counts_E) for part in (rows[:, :20], rows[:, 20:]))
    tiles_E = None if counts_E is None else (counts_E + 127) // 128
    close(columns_grouped(dy, columns, tiles_E, tile=64), columns_reference(dy, columns, tiles_E))
