"""Head and cross-entropy in chunks against the plain operations, ignored targets, the soft cap, gradients."""

import pytest
import torch
import torch.nn.functional as F
from cases import close
from torch import Tensor

from sextant.kernels.loss import IGNORE, summed_loss, token_losses


def problem(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, head and targets of which every third is ignored."""
    x_TD = torch.randn(tokens, 6, dtype=dtype, requires_grad=True)
    head_PD = torch.randn(11, 6, dtype=dtype, requires_grad=True)
    targets_T = torch.randint(11, (tokens,))
    targets_T[1::3] = IGNORE
    return x_TD, head_PD, targets_T


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("tokens", [1, 4, 13])
def test_sum_and_gradients_equal_the_plain_loss(tokens, chunk, softcap):
    x, head, targets = problem(tokens)
    got = summed_loss(x, head, targets, softcap, chunk)
    want = token_losses(x, head, targets, softcap).sum()
    close(got, want, 1e-12)
    got_grads = torch.autograd.grad(3 * got, (x, head))
    for g, w in zip(got_grads, torch.autograd.grad(3 * want, (x, head)), strict=True):
        close(g, w, 1e-12)


@pytest.mark.parametrize("tokens", [1, 13])
def test_fp32_equals_fp64(tokens):
    """The one buffer of this dtype holds logits, probabilities and gradient in turn."""
    x, head, targets = problem(tokens, torch.float32)
    got, exact = summed_loss(x, head, targets, chunk=5), token_losses(x.double(), head.double(), targets).sum()
    close(got.double(), exact, 1e-6)
    got_grads = torch.autograd.grad(got, (x, head))
    for g, w in zip(got_grads, torch.autograd.grad(exact, (x, head)), strict=True):
        close(g, w, 1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradient_equals_finite_differences(softcap):
    x, head, targets = problem(4)
    assert torch.autograd.gradcheck(lambda x, head: summed_loss(x, head, targets, softcap, 3), (x, head))


def test_token_losses_equal_the_definition():
    x, head, targets = problem(7)
    logits_TP = x @ head.T
    losses_T = token_losses(x, head, targets).detach()
    for loss, logits, target in zip(losses_T, logits_TP.detach(), targets.tolist(), strict=True):
        want = 0.0 if target == IGNORE else float(-(logits.exp() / logits.exp().sum())[target].log())
        assert float(loss) == pytest.approx(want, rel=1e-12)


def test_all_ignored_is_zero_with_zero_gradient():
    x, head, targets = problem(5)
    loss = summed_loss(x, head, torch.full_like(targets, IGNORE))
    assert loss.item() == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (x, head)))


def test_extreme_logits_stay_finite():
    x, head, targets = problem(9, torch.float32)
    loss = summed_loss(300 * x, head, targets)
    want = F.cross_entropy(300 * x.double() @ head.double().T, targets, ignore_index=IGNORE, reduction="sum")
    close(loss.double(), want, 1e-5)


def test_half_precision_rows_give_an_fp32_sum_and_gradient_of_the_master():
    x, head, targets = problem(64, torch.float32)
    half = x.detach().bfloat16().requires_grad_()
    loss = summed_loss(half, head, targets)
    assert loss.dtype == torch.float32
    dx, dhead = torch.autograd.grad(loss, (half, head))
    assert (dx.dtype, dhead.dtype) == (torch.bfloat16, torch.float32)
    assert loss.item() == pytest.approx(token_losses(x, head, targets).sum().item(), rel=1e-2)
