"""FP8 products as a GPU runs them, against numbers restored and multiplied in fp32; layers and compiled blocks too.

``SEXTANT_FP8_DRY=1`` runs the same lines on a CPU, where every way is the reference.
"""

import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import model_spec, params, random_tokens
from torch import Tensor

from sextant.axes.capacity import Dense, Experts, LatentExperts
from sextant.axes.capacity.stack import ExpertStack
from sextant.axes.kv import GQA
from sextant.axes.numerics import BF16, FP8Blocks, FP8Delayed, products
from sextant.axes.numerics.delayed import DelayedProduct
from sextant.axes.routing import SoftmaxTopK
from sextant.axes.stability import Linear, NormalInit, Role
from sextant.core.stream import Stream
from sextant.kernels import fp8
from sextant.kernels.fp8 import (
    E4M3,
    E5M2,
    FLOOR,
    GRADIENT_FLOOR,
    Scaled,
    blocks,
    columns_product,
    remembered,
    rows_product,
    scaling,
    tiles,
    tiles_down,
    whole,
)
from sextant.kernels.fp8.reference import columns_reference, rows_reference
from sextant.kernels.loss import summed_loss
from sextant.model.spec import Layer

DRY = os.environ.get("SEXTANT_FP8_DRY") == "1"
GPU = "cpu" if DRY else "cuda"
pytestmark = [] if DRY else pytest.mark.gpu
POLICIES = params([FP8Delayed(), FP8Blocks(), FP8Blocks(power_of_two=True)])
WAYS = ["reference"] if DRY else ["scaled_mm", "triton", "bf16"]


@pytest.fixture(params=WAYS)
def way(request):
    """One way of multiplying after the other."""
    fp8.only(request.param)
    yield request.param
    fp8.only(None)


def near(got: Tensor, want: Tensor, tolerance: float = 1e-2) -> None:
    """In the root mean square of the wanted values; bf16 rounds to 2^-9, sums of fp8 products may keep 14 bits."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    error = ((got - want).square().mean() / want.square().mean().clamp_min(1e-30)).sqrt().item()
    assert bool(got.isfinite().all()) and error <= tolerance, f"off by {error:.2e} in the root mean square"


def offered(way: str, product, *arguments) -> Tensor:
    """The result, or a skip: which shapes of tiles torch's scaled product takes is the library's to say."""
    try:
        return product(*arguments)
    except (RuntimeError, ValueError) as error:
        if way != "scaled_mm":
            raise
        pytest.skip(f"scaled_mm: {str(error).splitlines()[0][:150]}")


def on_cpu(x: Scaled) -> Scaled:
    return Scaled(x.values.cpu(), x.scale.cpu(), x.tile)


def operands(kind: str, rows: int, matrices: int, width: int, depth: int) -> tuple[Scaled, Scaled]:
    x, weight = torch.randn(rows, depth, device=GPU), torch.randn(matrices, width, depth, device=GPU)
    if kind == "tiles":
        x[:, : depth // 4] *= 1e4
        return tiles(x), blocks(weight)
    first = {"e4m3": E4M3, "e5m2": E5M2}[kind]
    scales = (torch.tensor(value, device=GPU) for value in (30.0, 60.0))
    return whole(x, next(scales), first)[0], whole(weight, next(scales), E4M3)[0]


SHAPES = [(1, 16, 128), (3, 40, 200), (127, 576, 257), (128, 128, 128), (513, 384, 1024)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["e4m3", "e5m2", "tiles"])
def test_rows_of_one_matrix(kind, shape, way):
    rows, width, depth = shape
    x, weight = operands(kind, rows, 1, width, depth)
    got = offered(way, rows_product, x, weight, None, torch.bfloat16)
    assert got.dtype == torch.bfloat16 and got.shape == (rows, width)
    near(got, rows_reference(on_cpu(x), on_cpu(weight), None, torch.float32))


@pytest.mark.parametrize("counts", [[0, 131, 3, 0], [1, 1, 1, 1], [0, 0, 0, 300], [256, 128, 64, 32]], ids=str)
@pytest.mark.parametrize(("width", "depth"), [(48, 208), (384, 512)])
@pytest.mark.parametrize("kind", ["e4m3", "e5m2", "tiles"])
def test_rows_of_experts(kind, width, depth, counts, way):
    x, weight = operands(kind, sum(counts), len(counts), width, depth)
    counts_E = torch.tensor(counts, device=GPU)
    got = offered(way, rows_product, x, weight, counts_E, torch.bfloat16)
    near(got, rows_reference(on_cpu(x), on_cpu(weight), counts_E.cpu(), torch.float32))


@pytest.mark.parametrize(("tall", "wide", "rows"), [(48, 200, 300), (384, 512, 1024), (1, 3, 5)])
def test_columns_of_one_matrix(tall, wide, rows, way):
    dy, x = (tiles_down(torch.randn(rows, size, device=GPU)) for size in (tall, wide))
    got = offered(way, columns_product, dy, x, None)
    assert got.dtype == torch.float32 and got.shape == (1, tall, wide) and got.is_contiguous()
    near(got, columns_reference(on_cpu(dy), on_cpu(x), None))


@pytest.mark.parametrize("counts", [[3], [1, 0, 2, 4], [0, 5, 0, 0]], ids=str)
@pytest.mark.parametrize(("tall", "wide"), [(48, 200), (384, 512)])
def test_columns(tall, wide, counts, way):
    total = 128 * (sum(counts) + 1)
    dy, x = (tiles(torch.randn(size, total, device=GPU)) for size in (tall, wide))
    tiles_E = torch.tensor(counts, device=GPU)
    got = offered(way, columns_product, dy, x, tiles_E)
    want = columns_reference(on_cpu(dy), on_cpu(x), tiles_E.cpu())
    assert got.dtype == torch.float32
    near(got, want)
    assert all((got[e] == 0).all() for e, count in enumerate(counts) if not count)


def agree(got: Scaled, want: Scaled) -> None:
    """Bit for bit, but for the bits of NaN."""
    values, scale, nan = got.values.cpu(), got.scale.cpu(), want.values.float().isnan()
    assert got.values.is_contiguous() and values.shape == want.values.shape and values.dtype == want.values.dtype
    assert torch.equal(values.float().isnan(), nan) and got.tile == want.tile
    assert torch.equal(values.view(torch.uint8)[~nan], want.values.view(torch.uint8)[~nan])
    assert torch.equal(scale.isnan(), want.scale.isnan()) and torch.equal(scale.nan_to_num(7), want.scale.nan_to_num(7))


def edges(form) -> Tensor:
    """Every value, every midpoint, their fp32 neighbours, both signs; what saturates, infinities, NaN, subnormals."""
    codes = torch.arange(127 if form is E4M3 else 124, dtype=torch.uint8).view(form.dtype).float()
    inf, ends = torch.tensor(float("inf")), torch.tensor([form.limit, 464.0, 480.0, 61440.0, 65536.0, 3.4e38])
    found = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, ends])
    around = torch.cat([found, torch.nextafter(found, inf), torch.nextafter(found, -inf), torch.randn(10_000) * 100])
    odd = torch.tensor([0.0, float("inf"), float("nan"), 1e-45, 1.2e-38])
    return torch.cat([around, -around, odd, -odd])


def as_they_lie(dtype: torch.dtype) -> list[Tensor]:
    """Contiguous and transposed, short edges, stacks, steps in both axes, nothing; groups of all sizes."""
    x, stack, large = torch.randn(130, 257), torch.randn(3, 40, 129), torch.randn(2, 256, 384)
    x[:, 3] *= 1e4
    stack[1] *= 1e-6
    large[0, 128:, :128] = 0
    found = [x, x.t(), stack, stack.mT, large, large.mT, x[:1], x[::3, ::2], torch.zeros(5, 7), torch.zeros(0, 64)]
    return [one.to(dtype) for one in found]


FORMATS = params([E4M3, E5M2])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def state_of(*scales: float, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    scale = torch.tensor(scales, device=device)
    return scale, torch.zeros_like(scale), torch.zeros_like(scale, dtype=torch.int64)


@pytest.mark.skipif(DRY, reason="needs a GPU")
def test_casts_are_tritons():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scaling._on_gpu() is not None


@DTYPES
@pytest.mark.parametrize("factor", [1.0, 0.37, 200.0])
@pytest.mark.parametrize("form", FORMATS)
def test_casts_equal_those_of_a_cpu(form, factor, dtype):
    for x in [edges(form).to(dtype), edges(form)[:10_000].view(100, 100).t().to(dtype), *as_they_lie(dtype)]:
        want, count = whole(x, torch.tensor(factor), form)
        got, over = whole(x.to(GPU), torch.tensor(factor, device=GPU), form)
        agree(got, want)
        assert over.item() == count.item()
    assert whole(edges(form).to(GPU), torch.tensor(factor, device=GPU), form)[1].item() > 0


@DTYPES
@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("scale", [0.0, 250.0])
@pytest.mark.parametrize("form", FORMATS)
def test_state_equals_that_of_a_cpu(form, scale, record, dtype):
    """With and without a history: values, largest magnitudes and counts of two tensors, each in its column."""
    odd = [torch.full((3, 5), float("inf")), torch.tensor([[1.0, float("nan"), -float("inf")]])]
    for column, x in enumerate([*as_they_lie(dtype), *odd, torch.randn(3000, 700).to(dtype)]):
        want, got = state_of(*[scale] * 13), state_of(*[scale] * 13, device=GPU)
        for part in (x, (x.mT * 2).mT):
            cast = remembered(part, form, column, want, record)
            agree(remembered(part.to(GPU), form, column, got, record), cast)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.cpu().nan_to_num(-1), b.nan_to_num(-1))
        assert bool(want[1].isnan().any() or want[1].sum() > 0) is (record and bool((x != 0).any()))


@DTYPES
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_scales_equal_those_of_a_cpu(form, power_of_two, dtype):
    """Division is IEEE's there too: tiles and blocks of every layout, with values that are no numbers."""
    odd = torch.randn(4, 300).to(dtype)
    odd[0, 3], odd[1, 140], odd[2, 290] = float("nan"), float("inf"), -float("inf")
    for x in [*as_they_lie(dtype), odd]:
        for floor in (FLOOR, GRADIENT_FLOOR):
            agree(tiles(x.to(GPU), form, floor, power_of_two), tiles(x, form, floor, power_of_two))
        agree(blocks(x.to(GPU), form, power_of_two), blocks(x, form, power_of_two))


COUNTS = [None, [0, 131, 3, 0, 1], [128, 0, 256], [0, 0, 5], [0] * 17 + [130], [0, 0], list(range(70))]


@DTYPES
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_tiles_down_equal_those_of_a_cpu(counts, dtype):
    """Rows of experts at their places, as they are without experts."""
    x = (torch.randn(135 if counts is None else sum(counts), 150) * 1e-3).to(dtype)
    on_cpu_E = None if counts is None else torch.tensor(counts)
    on_gpu_E = None if counts is None else on_cpu_E.to(GPU)
    for form, power_of_two in ((E4M3, False), (E5M2, True)):
        agree(tiles_down(x.to(GPU), form, FLOOR, power_of_two, on_gpu_E),
              tiles_down(x, form, FLOOR, power_of_two, on_cpu_E))


def through(layer, x: Tensor, dy: Tensor, *rest: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x, *rest)
    y.backward(dy)
    return [y, x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("rows", [1, 37, 300])
@pytest.mark.parametrize("policy", POLICIES)
def test_linear_equals_the_cpu(policy, rows):
    """Output and gradients of the same layer on both devices."""
    layer = Linear(272, 144, Role.FF_IN)
    torch.nn.init.normal_(layer.weight, std=0.06)
    policy.attach(layer)
    x, dy = torch.randn(rows, 272).bfloat16(), torch.randn(rows, 144).bfloat16() * 1e-6
    want = through(layer, x, dy)
    layer.zero_grad()
    for got, one in zip(through(layer.to(GPU), x.to(GPU), dy.to(GPU)), want, strict=True):
        near(got, one, 3e-2)


@pytest.mark.parametrize("counts", [[0, 131, 3, 0, 1], [64, 64, 64, 64, 64]], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_experts_equal_the_cpu(policy, counts):
    stack = ExpertStack(5, 160, 64, "swiglu")
    for weight in stack.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    policy.attach(stack)
    x, dy, counts_E = torch.randn(sum(counts), 160).bfloat16(), torch.randn(sum(counts), 160), torch.tensor(counts)
    want = through(stack, x, dy.bfloat16(), counts_E)
    stack.zero_grad()
    got = through(stack.to(GPU), x.to(GPU), dy.bfloat16().to(GPU), counts_E.to(GPU))
    for one, other in zip(got, want, strict=True):
        near(one, other, 6e-2)  # what rounds another way passes two more products


MIXTURES = (
    Dense(hidden=64),
    Experts(experts=6, hidden=32, router=SoftmaxTopK(top_k=2), shared=16),
    LatentExperts(experts=6, hidden=32, latent=16, router=SoftmaxTopK(top_k=3)),
)


def model_of(policy, feed_forward):
    layer = Layer(kv=GQA(heads=4, kv_heads=2, head_dim=16), feed_forward=feed_forward)
    return model_spec(layer, layer, width=64, init=NormalInit(std=0.1)).build(policy, seed=3, device=GPU).train()


def gradients(model) -> Tensor:
    tokens_T = random_tokens(64).to(GPU)
    out = model(tokens_T, Stream.of_lengths([24, 40], GPU))
    (summed_loss(out.hidden_TD, model.head_PD, tokens_T.roll(-1)) / 64).backward()
    grads = [parameter.grad for parameter in model.parameters()]
    assert all(grad is not None and grad.dtype == torch.float32 and bool(grad.isfinite().all()) for grad in grads)
    return torch.cat([grad.flatten() for grad in grads])


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.double().cpu(), b.double().cpu(), dim=0).item()


@pytest.mark.parametrize("feed_forward", params(MIXTURES))
@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_follow_bf16(policy, feed_forward):
    got, want = gradients(model_of(policy, feed_forward)), gradients(model_of(BF16(), feed_forward))
    assert cosine(got, want) > 0.97 and not torch.equal(got, want)


@pytest.mark.parametrize("feed_forward", params(MIXTURES))
@pytest.mark.parametrize("policy", POLICIES)
def test_compiled_blocks(policy, feed_forward):
    """Generated code around opaque products: the same gradients, the same largest values put down."""
    torch._dynamo.reset()
    plain, compiled = (model_of(policy, feed_forward) for _ in range(2))
    for block in compiled.blocks:
        block.compile(backend="aot_eager") if DRY else block.compile()
    for _ in range(2):
        want, got = gradients(plain), gradients(compiled)
        assert cosine(got, want) > 0.99
        for a, b in zip(products(plain), products(compiled), strict=True):
            if isinstance(a, DelayedProduct) and isinstance(b, DelayedProduct):
                assert ((a.amax > 0) & (b.amax > 0)).all()
                torch.testing.assert_close(a.amax, b.amax, rtol=0.25, atol=0)
        for model in (plain, compiled):
            policy.after_step(model)
            model.zero_grad()


@pytest.mark.parametrize("policy", POLICIES)
def test_learns(policy):
    model, losses = model_of(policy, MIXTURES[1]), []
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens_T, stream = random_tokens(64).to(GPU), Stream.of_lengths([24, 40], GPU)
    for _ in range(20):
        optimiser.zero_grad()
        loss = summed_loss(model(tokens_T, stream).hidden_TD, model.head_PD, tokens_T.roll(-1)) / 64
        loss.backward()
        optimiser.step()
        policy.after_step(model)
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_what_was_chosen_is_fp8():
    """No kind of product falls back to bf16 here, and none says why it could not be served."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fp8.only(None)
        for kind in ("e4m3", "e5m2", "tiles"):
            for matrices in (1, 4):
                x, weight = operands(kind, 96, matrices, 128, 256)
                counts_E = None if matrices == 1 else torch.tensor([0, 32, 0, 64], device=GPU)
                rows_product(x, weight, counts_E, torch.bfloat16)
        for tiles_E in (None, torch.tensor([1, 1], device=GPU)):
            dy, x = (tiles(torch.randn(128, 256, device=GPU)) for _ in range(2))
            columns_product(dy, x, tiles_E)
    report = "\n".join([*(f"{kind}: {taken}" for kind, taken in fp8.paths().items()), *(str(w.message) for w in said)])
    print(report)
    assert "bf16" not in fp8.paths().values(), report
    assert len(fp8.paths()) == 8
