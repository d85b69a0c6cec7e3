"""FP8 policies: gradients of a layer, scales that follow the steps, nothing counted twice, resumed bit for bit."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import model_spec, name, random_tokens
from torch import Tensor

from sextant.axes.capacity import Dense, Experts
from sextant.axes.capacity.stack import ExpertStack
from sextant.axes.kv import GQA
from sextant.axes.numerics import BF16, TABLE, FP8Blocks, FP8Delayed, is_training_state, products
from sextant.axes.numerics.delayed import DY, DelayedProduct, W, X
from sextant.axes.numerics.fp8 import FP8
from sextant.axes.routing import CappedRounds, SoftmaxTopK
from sextant.axes.stability import Linear, NormalInit, Role
from sextant.core.stream import Stream
from sextant.kernels.loss import summed_loss
from sextant.model.spec import Layer, ModelSpec

KV = GQA(heads=4, kv_heads=2, head_dim=8)
MOE = Experts(experts=4, hidden=16, shared=8, router=SoftmaxTopK(top_k=2))
SPEC: ModelSpec = model_spec(
    Layer(kv=GQA(heads=4, kv_heads=2, head_dim=8, bias=True), feed_forward=Dense(hidden=24)),
    Layer(kv=KV, feed_forward=MOE),
    width=32, init=NormalInit(std=0.1),
)
POLICIES = [
    pytest.param(example, id=name(example)) for row in TABLE for example in row.examples if isinstance(example, FP8)
]
OFF = FP8Delayed(forward="bf16", data_gradient="bf16")


def gradients(model, rows: int = 40, recompute: bool = False) -> dict[str, Tensor]:
    model.train().zero_grad()
    model.recompute, tokens_T = recompute, random_tokens(rows)
    out = model(tokens_T, Stream.of_lengths([rows]))
    (summed_loss(out.hidden_TD, model.head_PD, tokens_T.roll(-1)) / rows).backward()
    return {key: parameter.grad.clone() for key, parameter in model.named_parameters()}


def flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([one.flatten() for one in gradient.values()])


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


# --- one layer ------------------------------------------------------------------------------------------------------


def dense(policy: FP8, inputs: int = 256, outputs: int = 192, bias: bool = False) -> Linear:
    layer = Linear(inputs, outputs, Role.FF_IN, bias)
    torch.nn.init.normal_(layer.weight, std=inputs**-0.5)
    if bias:
        torch.nn.init.normal_(layer.bias)
    policy.attach(layer)
    return layer


def through(layer, x: Tensor, dy: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x, *rest)
    y.backward(dy)
    return y.detach(), x.grad


@pytest.mark.parametrize("rows", [1, 7, 128, 300])
@pytest.mark.parametrize("policy", POLICIES)
def test_fp8_7_gradients_of_a_linear_layer(policy, rows):
    """Against fp64: E4M3 keeps 4 digits, E5M2 3."""
    layer, x, dy = dense(policy, bias=True), torch.randn(rows, 256).bfloat16(), torch.randn(rows, 192).bfloat16() * 1e-6
    y, dx = through(layer, x, dy)
    weight, exact = layer.weight.detach().double(), x.double()
    assert y.dtype == dx.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    assert cosine(y - layer.bias.detach().bfloat16(), exact @ weight.t()) > 0.999
    assert cosine(dx, dy.double() @ weight) > (0.998 if getattr(policy, "data_gradient", "") == "e5m2" else 0.999)
    assert cosine(layer.weight.grad, dy.double().t() @ exact) > 0.999
    torch.testing.assert_close(layer.bias.grad, dy.float().sum(0), rtol=2e-2, atol=1e-7)


def stack(policy: FP8 | None, experts: int = 5, activation: str = "swiglu") -> ExpertStack:
    made = ExpertStack(experts, 160, 48, activation)
    for weight in (made.up_EDF, made.down_EFD):
        torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    if policy is not None:
        policy.attach(made)
    return made


@pytest.mark.parametrize("counts", [[0, 131, 3, 0, 1], [0, 0, 9, 0, 0], [2, 2, 2, 2, 2]], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_experts_empty_odd_and_alone(policy, counts):
    """Each expert as a layer of its own would do, and no gradient for one without rows."""
    made, counts_E = stack(policy), torch.tensor(counts)
    plain = stack(None)
    plain.load_state_dict({key: value for key, value in made.state_dict().items() if not is_training_state(key)}, False)
    plain.double()
    x, dy = torch.randn(sum(counts), 160).bfloat16(), torch.randn(sum(counts), 160).bfloat16()
    y, dx = through(made, x, dy, counts_E)
    want_y, want_dx = through(plain, x.double(), dy.double(), counts_E)
    assert cosine(y, want_y) > 0.997 and cosine(dx, want_dx) > 0.99
    for got, want in ((made.up_EDF.grad, plain.up_EDF.grad), (made.down_EFD.grad, plain.down_EFD.grad)):
        assert cosine(got, want) > 0.99 and got.dtype == torch.float32
        assert all((got[e] == 0).all() == (count == 0) for e, count in enumerate(counts))


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("policy", POLICIES)
def test_no_rows_at_all(policy, activation):
    made = stack(policy, activation=activation)
    y, dx = through(made, torch.zeros(0, 160).bfloat16(), torch.zeros(0, 160).bfloat16(), torch.zeros(5).long())
    assert y.shape == dx.shape == (0, 160) and (made.up_EDF.grad == 0).all()


def test_weight_gradient_stays_bf16():
    """Whatever forward and data gradient round to, given the same rows and gradient it is the bf16 product."""
    layer, x, dy = dense(FP8Delayed()), torch.randn(50, 256).bfloat16(), torch.randn(50, 192).bfloat16()
    through(layer, x, dy)
    assert torch.equal(layer.weight.grad, (dy.t() @ x).float())


def test_tiles_of_the_weight_gradient_run_along_tokens():
    """An outlier token harms its own 128 tokens only; with a tile along channels it would harm its own row only."""
    layer, x, dy = dense(FP8Blocks(), 128, 128), torch.randn(256, 128).bfloat16(), torch.randn(256, 128).bfloat16()
    x[0, 0] = 1e6
    through(layer, x, dy)
    want = dy.double().t() @ x.double()
    assert cosine(layer.weight.grad[:, 1:], want[:, 1:]) > 0.999


def test_leading_axes_are_kept():
    layer = dense(FP8Blocks())
    x = torch.randn(2, 3, 256).bfloat16()
    assert torch.equal(layer(x).flatten(0, 1), layer(x.flatten(0, 1)))


def test_only_hidden_matrices_have_products():
    model = SPEC.replace(tied=False).build(FP8Blocks())
    for key, module in model.named_modules():
        if isinstance(module, Linear):
            assert (module.product is not None) == (module.role not in (Role.HEAD, Role.ROUTER)), key
    assert len(model.get_submodule("blocks.1.feed_forward.experts").products) == 2


# --- a model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_of_a_model_follow_bf16(policy):
    got, want = gradients(SPEC.build(policy, seed=1)), gradients(SPEC.build(BF16(), seed=1))
    assert cosine(flat(got), flat(want)) > 0.98
    assert all(cosine(got[key], want[key]) > 0.85 for key in want if want[key].norm() > 1e-3 * flat(want).norm())
    assert not torch.equal(flat(got), flat(want))


def test_switched_off_it_is_bf16_bit_for_bit():
    """Forward and data gradient in bf16: what is left is the weight gradient, and it is exact."""
    got, want = gradients(SPEC.build(OFF, seed=1)), gradients(SPEC.build(BF16(), seed=1))
    assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize(
    "policy", [FP8Delayed(forward="bf16"), FP8Delayed(data_gradient="bf16"), FP8Delayed(data_gradient="e4m3")], ids=name
)
def test_every_switch_is_wired(policy):
    others = [gradients(SPEC.build(other, seed=1)) for other in (FP8Delayed(), OFF)]
    got = gradients(SPEC.build(policy, seed=1))
    assert not any(torch.equal(flat(got), flat(other)) for other in others)


@pytest.mark.parametrize("policy", [FP8Delayed(), FP8Blocks()], ids=name)
def test_compiled_blocks_have_the_gradients_of_eager_ones(policy):
    """Graphs alone; a GPU test compares generated code. Products are opaque, so nothing of theirs is traced away."""
    spec = SPEC.replace(layers=SPEC.layers[1:])
    plain, compiled = (spec.build(policy, seed=1) for _ in range(2))
    for block in compiled.blocks:
        block.compile(backend="aot_eager")
    want, got = gradients(plain), gradients(compiled)
    assert cosine(flat(got), flat(want)) > 0.999
    for a, b in zip(products(plain), products(compiled), strict=True):
        if isinstance(a, DelayedProduct) and isinstance(b, DelayedProduct):
            torch.testing.assert_close(a.amax, b.amax, rtol=0.15, atol=0)
            assert ((a.amax > 0) == (b.amax > 0)).all()


def test_capped_rounds_use_the_products():
    """Their experts run one by one inside a function of their own, forward and backward."""
    layer = Layer(kv=KV, feed_forward=MOE.replace(overflow=CappedRounds(cap=32, tile=16)))
    model = model_spec(layer, width=32, init=NormalInit(std=0.1)).build(FP8Delayed(), seed=1)
    gradients(model)
    stacked = model.get_submodule("blocks.0.feed_forward.experts").products
    assert all((one.amax > 0).all() for one in stacked.values())


# --- scales ---------------------------------------------------------------------------------------------------------


def step(layer: Linear, policy: FP8Delayed, x: Tensor, dy: Tensor | None = None) -> int:
    through(layer, x, torch.ones(len(x), layer.weight.shape[0]).bfloat16() if dy is None else dy)
    return policy.after_step(layer)


def small(policy: FP8Delayed) -> tuple[Linear, DelayedProduct]:
    layer = dense(policy, 16, 16)
    assert isinstance(layer.product, DelayedProduct)
    return layer, layer.product


def test_constant_input_has_a_constant_scale():
    """From the first step on, which a tensor's own largest value scales to the same."""
    policy, x = FP8Delayed(history=4), torch.randn(5, 16).bfloat16()
    layer, product = small(policy)
    outputs, scales = [], []
    for _ in range(7):
        outputs.append(through(layer, x, torch.ones(5, 16).bfloat16())[0])
        assert policy.after_step(layer) == 0
        scales.append(product.scale.clone())
    assert all(torch.equal(scale, scales[0]) for scale in scales)
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    assert torch.isclose(scales[0][X], 448 / x.abs().max().float(), rtol=1e-6) and scales[0][DY] == 57344
    assert torch.isclose(scales[0][W], 448 / layer.weight.detach().abs().max(), rtol=1e-6)


def test_an_outlier_leaves_after_exactly_1024_steps():
    policy, x = FP8Delayed(), torch.randn(3, 16).bfloat16()
    layer, product = small(policy)
    step(layer, policy, x)
    before = product.scale.clone()
    step(layer, policy, x * 64)
    low = product.scale.clone()
    assert low[X] == before[X] / 64 and torch.equal(low[W:], before[W:])
    for _ in range(1023):
        step(layer, policy, x)
        assert torch.equal(product.scale, low)
    step(layer, policy, x)
    assert torch.equal(product.scale, before)


def test_margin_is_in_powers_of_two():
    policy, x = FP8Delayed(margin=3), torch.randn(3, 16).bfloat16()
    layer, product = small(policy)
    step(layer, policy, x)
    assert torch.isclose(product.scale[X], 448 / x.abs().max().float() / 8, rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_spoils_no_history(bad):
    policy, x = FP8Delayed(history=3), torch.randn(3, 16).bfloat16()
    layer, product = small(policy)
    step(layer, policy, x)
    before = product.scale.clone()
    broken = x.clone()
    broken[1, 2] = bad
    step(layer, policy, broken)
    assert torch.equal(product.scale, before) and product.history.isfinite().all()


def test_saturated_values_are_counted_once_a_step():
    policy, x = FP8Delayed(history=2), torch.full((4, 16), 1.0).bfloat16()
    layer, product = small(policy)
    assert step(layer, policy, x) == 0
    loud = x.clone()
    loud[0, :3], loud[1, 0] = 2.0, 1.03  # beyond 464/448 of the largest so far, and still rounded to it
    assert step(layer, policy, loud, torch.full((4, 16), -9.0).bfloat16()) == 3 + 64
    assert (product.saturated == 0).all() and step(layer, policy, loud) == 0


def test_evaluation_leaves_no_trace():
    policy, x = FP8Delayed(), torch.randn(3, 16).bfloat16()
    layer, product = small(policy)
    step(layer, policy, x)
    before = copy.deepcopy(product.state_dict())
    layer.eval()
    with torch.no_grad():
        layer(x * 100)
    assert (product.amax == 0).all() and (product.saturated == 0).all()
    assert all(torch.equal(value, before[key]) for key, value in product.state_dict().items())


def warmed(policy: FP8, steps: int = 2):
    model = SPEC.build(policy, seed=1)
    for count in range(steps):
        gradients(model, 20 + 8 * count)
        policy.after_step(model)
    return model


def test_recomputation_counts_nothing_twice():
    """The same gradients, histories and counts; more rows than the history has seen, so that values do saturate."""
    policy = FP8Delayed()
    plain, again = warmed(policy), warmed(policy)
    want, got = gradients(plain, 60), gradients(again, 60, recompute=True)
    assert torch.equal(flat(got), flat(want))
    counts = policy.after_step(plain), policy.after_step(again)
    assert counts[0] == counts[1] > 0
    for a, b in zip(products(plain), products(again), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers(), strict=True))


def test_micro_batches_share_one_step():
    policy, x = FP8Delayed(history=5), torch.randn(8, 16).bfloat16()
    whole, product = small(policy)
    parts = copy.deepcopy(whole)
    through(whole, x, torch.ones(8, 16).bfloat16())
    for part in x.split(2):
        through(parts, part, torch.ones(2, 16).bfloat16())
    for layer in (whole, parts):
        policy.after_step(layer)
    assert torch.equal(product.history, parts.product.history) and (product.history[1:] == 0).all()


def test_ranks_share_the_largest_value():
    policy, x = FP8Delayed(), torch.randn(3, 16).bfloat16()
    layer, product = small(policy)
    through(layer, x, torch.ones(3, 16).bfloat16())
    policy.after_step(layer, reduce=lambda amax: torch.maximum(amax, torch.full_like(amax, 56.0)))
    assert product.scale.tolist() == [8.0, 8.0, 1024.0]


@pytest.mark.parametrize("policy", POLICIES)
def test_saved_in_mid_history_it_goes_on_bit_for_bit(policy):
    unbroken = warmed(policy, 3)
    resumed = SPEC.build(policy, seed=9)
    resumed.load_state_dict(copy.deepcopy(warmed(policy, 3).state_dict()))
    for _ in range(3):
        want, got = gradients(unbroken, 33), gradients(resumed, 33)
        assert torch.equal(flat(got), flat(want))
        assert policy.after_step(unbroken) == policy.after_step(resumed)
    want, got = unbroken.state_dict(), resumed.state_dict()
    assert list(want) == list(got) and all(torch.equal(want[key], got[key]) for key in want)
    assert any(is_training_state(key) for key in want) is isinstance(policy, FP8Delayed)


def test_without_its_history_it_goes_on_otherwise():
    """The test above can fail: the history matters."""
    policy = FP8Delayed()
    unbroken, resumed = warmed(policy, 3), SPEC.build(policy, seed=1)
    assert not torch.equal(flat(gradients(unbroken, 33)), flat(gradients(resumed, 33)))


def test_serving_is_bf16():
    assert FP8Delayed().serving == FP8Blocks().serving == BF16() == BF16().serving
    assert FP8Blocks().itemsize == 2 and FP8Blocks().compute == torch.bfloat16
