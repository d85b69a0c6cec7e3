"""The one forward: its options, recomputation, the padded batch, and whole-model gradients."""

import pytest
import torch
from cases import DENSE, MOE, WIDTH, built, close, model_spec, random_tokens, run
from torch import Tensor

from sextant.axes.attention import Window
from sextant.axes.kv import GQA, NoPE
from sextant.axes.numerics import FP32
from sextant.axes.stability import RMSNorm, SandwichNorm
from sextant.core.stream import Stream
from sextant.kernels.loss import summed_loss
from sextant.model.spec import Layer

LAYERS = (
    Layer(attention=Window(window=3), kv=GQA(heads=4, kv_heads=2, head_dim=4, qk_norm=RMSNorm()), feed_forward=DENSE),
    Layer(kv=GQA(heads=2, kv_heads=1, head_dim=4, position=NoPE()), feed_forward=MOE, residual=SandwichNorm()),
)


def build(**fields):
    return model_spec(*LAYERS, **fields).build(seed=4).double()


def loss_and_gradients(model, lengths: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    tokens_T = random_tokens(sum(lengths))
    out = model(tokens_T, Stream.of_lengths(lengths))
    loss = summed_loss(out.hidden_TD, model.head_PD, tokens_T.roll(-1), model.spec.softcap)
    names, weights = zip(*model.named_parameters(), strict=True)
    return loss, dict(zip(names, torch.autograd.grad(loss, weights), strict=True))


@pytest.mark.parametrize("fields", [{}, {"tied": True, "embedding_scale": 3.0, "softcap": 4.0}], ids=["plain", "tied"])
def test_gradient_of_a_whole_model_equals_finite_differences(fields):
    """Along a random direction of every parameter at once; experts do not change over so small a step."""
    model = build(**fields)
    _, grads = loss_and_gradients(model, [5, 3])
    for name, parameter in model.named_parameters():
        direction, step = torch.randn_like(parameter), 1e-6
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
            values.append(loss_and_gradients(model, [5, 3])[0].item())
            with torch.no_grad():
                parameter.add_(direction, alpha=-sign * step)
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx((grads[name] * direction).sum().item(), rel=1e-4, abs=1e-6), name


def test_recomputation_changes_nothing():
    model = build()
    loss, grads = loss_and_gradients(model, [9, 4])
    model.recompute = True
    again, same = loss_and_gradients(model, [9, 4])
    assert torch.equal(loss, again)
    assert all(torch.equal(grads[name], same[name]) for name in grads)


def test_gradients_of_packed_documents_add_up():
    """No gradient leaks either: the sum of separate backward passes is that of the packed one."""
    model, tokens_T = build(), random_tokens(11)
    targets_T = random_tokens(11, seed=5)
    weights = list(model.parameters())

    def gradient(tokens_T, targets_T, lengths):
        hidden_TD = model(tokens_T, Stream.of_lengths(lengths)).hidden_TD
        return torch.autograd.grad(summed_loss(hidden_TD, model.head_PD, targets_T), weights)

    packed = gradient(tokens_T, targets_T, [4, 7])
    first, second = gradient(tokens_T[:4], targets_T[:4], [4]), gradient(tokens_T[4:], targets_T[4:], [7])
    for whole, a, b in zip(packed, first, second, strict=True):
        close(whole, a + b, 1e-10)


def test_padded_batch_equals_ragged_rows():
    model, lengths = build(), [5, 2, 4]
    tokens_BT = random_tokens(15).view(3, 5)
    with torch.no_grad():
        padded_BTP = model.batch_logits(tokens_BT, lengths)
        whole_BTP = model.batch_logits(tokens_BT)
    for row, length, tokens_T in zip(padded_BTP, lengths, tokens_BT, strict=True):
        close(row[:length], run(model, tokens_T[:length], [length]))
        assert (row[length:] == 0).all()
    close(whole_BTP[1], run(model, tokens_BT[1], [5]))


def test_softcap_bounds_the_logits():
    capped, free, tokens_T = build(softcap=0.5), build(), random_tokens(9)
    close(run(capped, tokens_T, [9]), 0.5 * torch.tanh(run(free, tokens_T, [9]) / 0.5))


def test_embedding_scale():
    scaled, plain, tokens_T = build(embedding_scale=2.5), build(), random_tokens(9)
    with torch.no_grad():
        plain.embedding.weight.mul_(2.5)
    close(run(scaled, tokens_T, [9]), run(plain, tokens_T, [9]))


def test_tied_head_is_the_embedding():
    model = build(tied=True)
    assert model.head_PD is model.embedding.weight
    assert "head.weight" not in model.state_dict()


def test_routings_by_layer():
    out = build()(random_tokens(9), Stream.of_lengths([9]))
    assert list(out.routings) == [1]
    assert out.routings[1].experts_TA.shape == (9, 2)


def test_a_model_without_mixtures_is_a_plain_dense_model():
    out = built()(random_tokens(9), Stream.of_lengths([9]))
    assert out.routings == {}


def test_meta_build_has_shapes_without_memory():
    spec = model_spec(*LAYERS)
    meta, real = spec.build(device="meta"), spec.build()
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert {k: v.shape for k, v in meta.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}


def test_numerics_default_to_fp32():
    assert isinstance(model_spec(*LAYERS).build().numerics, FP32)


def test_final_rows_follow_the_last_norm():
    model = build()
    out = model(random_tokens(9), Stream.of_lengths([9]))
    assert out.hidden_TD.shape == (9, WIDTH)
    close(out.hidden_TD.square().mean(-1), torch.ones(9, dtype=torch.float64), 1e-4)


def test_a_chunk_over_bfloat16_memory_takes_the_memorys_dtype():
    """Decoding states follow the parameters: fp64 in tests, fp32 in runs."""
    assert build().memory(2).layers[0].k.dtype == torch.float64
    assert model_spec(*LAYERS).build().memory(2).layers[0].k.dtype == torch.float32
