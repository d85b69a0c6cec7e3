"""Ways to merge blocks that were tried and dropped (spec sparse-attention 2, L6 to L8): they live here only.

Parts of one softmax are merged by their log-sum-exp. Adding outputs up, or weighing them by the gate's scores, is not
full attention even when every block is read, so nothing could have told a bug from a design.
"""

from __future__ import annotations

import pytest
import torch
from cases import close
from torch import Tensor

from sextant.kernels.attention import Scores, attend_dense

BLOCK, BLOCKS, SCALE = 32, 10, 0.25


def parts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs ``[M, H, V]``, log-sum-exps and gate scores ``[M, H]`` of the last query by block, and full attention."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 4, 16, generator=generator, dtype=torch.float64) for n in (1, 320, 320))
    seen = torch.ones(1, BLOCK, dtype=torch.bool)
    o_lse = [attend_dense(q, a, b, seen, Scores(SCALE)) for a, b in zip(k.split(BLOCK), v.split(BLOCK), strict=True)]
    gate_MH = torch.einsum("hk,mhk->mh", q[0], k.unflatten(0, (BLOCKS, BLOCK)).mean(1))
    whole = attend_dense(q, k, v, torch.ones(1, 320, dtype=torch.bool), Scores(SCALE))[0][0]
    return torch.stack([o[0] for o, _ in o_lse]), torch.stack([lse[:, 0] for _, lse in o_lse]), gate_MH, whole


def size(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def test_log_sum_exp_of_all_blocks_is_full_attention():
    o_MHV, lse_MH, _, whole = parts()
    close((lse_MH.softmax(0)[..., None] * o_MHV).sum(0), whole, 1e-12)


def test_plain_addition_is_several_times_too_large():
    """L6: about the number of blocks times too large, so it grows with the context."""
    o_MHV, _, _, whole = parts()
    assert size(o_MHV.sum(0)) > 6 * size(whole)


@pytest.mark.parametrize("temperature", [1.0, SCALE])
def test_weights_of_the_gate_are_not_full_attention(temperature):
    """L7: the gate knows a block's mean score, not how many keys stand out in it."""
    o_MHV, _, gate_MH, whole = parts()
    mixed = ((temperature * gate_MH).softmax(0)[..., None] * o_MHV).sum(0)
    assert size(mixed - whole) > 0.1 * size(whole)
