"""Block maxima of full attention against the whole map, however the rows are chunked."""

import pytest
import torch

from sextant.kernels.attention import Scores, truth
from sextant.kernels.attention.truth import block_truth


def by_the_map(q_THK, k_SGK, block, scale):
    """The dense map, causal, softmax, largest per block."""
    first, heads = len(k_SGK) - len(q_THK), q_THK.shape[1]
    k_SHK = k_SGK.repeat_interleave(heads // k_SGK.shape[1], 1)
    map_THS = torch.einsum("thk,shk->ths", q_THK, k_SHK) * scale
    later_TS = torch.arange(len(k_SGK)) > torch.arange(first, len(k_SGK))[:, None]
    map_THS = map_THS.masked_fill(later_TS[:, None], -torch.inf).softmax(-1)
    return torch.stack([part.amax(-1) for part in map_THS.split(block, dim=-1)], dim=-1)


@pytest.mark.parametrize("chunk", [1, 700, 64 << 20])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 1), (6, 6)])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (1, 9), (4, 4), (5, 5), (13, 13), (6, 17), (12, 24)])
def test_equals_the_map(tokens, keys, heads, groups, chunk, monkeypatch):
    monkeypatch.setattr(truth, "CHUNK_BYTES", chunk)
    q = torch.randn(tokens, heads, 8, dtype=torch.float64)
    k = torch.randn(keys, groups, 8, dtype=torch.float64)
    got = block_truth(q, k, 4, Scores(0.6))
    torch.testing.assert_close(got, by_the_map(q, k, 4, 0.6), rtol=1e-12, atol=1e-14)


def test_large_scores_stay_finite_and_half_precision_is_scored_in_fp32():
    q, k = (1e3 * torch.randn(9, 2, 8) for _ in range(2))
    assert block_truth(q, k, 2, Scores(1.0)).isfinite().all()
    q, k = (torch.randn(9, 2, 8).bfloat16() for _ in range(2))
    got = block_truth(q, k, 2, Scores(1.0))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), by_the_map(q.double(), k.double(), 2, 1.0), rtol=1e-5, atol=1e-6)


def test_a_target_has_no_gradient():
    q = torch.randn(5, 2, 8, requires_grad=True)
    assert not block_truth(q, q, 2, Scores(1.0)).requires_grad
