"""Linear attention on a CUDA device: bf16 rows with an fp32 state against fp64, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from sextant.kernels.linear import linear_attention

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("form", ["head", "channel"])
@pytest.mark.parametrize("tokens", [1, 63, 1000])
def test_half_precision_rows_against_fp64(form, tokens):
    """The same code as on the CPU; TF32 is off by default, so only the inputs are rounded."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, tokens, 4, width, generator=generator).bfloat16() for width in (64, 64, 32)]
    if form == "head":
        log = -torch.rand(4, generator=generator)
    else:
        log = F.logsigmoid(torch.randn(2, tokens, 4, 64, generator=generator)) / 16
    state = torch.randn(2, 4, 64, 32, generator=generator)
    upstream = torch.randn(2, tokens, 4, 32, generator=generator)
    found = []
    for device, dtype in (("cuda", None), ("cpu", torch.float64)):
        leaves = [x.to(device, dtype or x.dtype).requires_grad_() for x in (*rows, log, state)]
        o_BTHV, after = linear_attention(*leaves)
        assert o_BTHV.dtype == after.dtype == (dtype or torch.float32)
        loss = (o_BTHV * upstream.to(device)).sum() + after.square().sum()
        found.append([o_BTHV, after, *torch.autograd.grad(loss, leaves)])
    for got, want in zip(*found, strict=True):
        assert (got.cpu().double() - want).norm() < 1e-2 * want.norm()
