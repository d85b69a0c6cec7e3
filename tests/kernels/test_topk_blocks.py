"""Choosing blocks: against a stable sort, in chunks as at once."""

import math

import pytest
import torch

from sextant.kernels.attention import topk
from sextant.kernels.attention.topk import best, block_means, choose, top_blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("places", [1, 2, 7, 40])
def test_best_is_a_stable_sort(places, dtype):
    """Ties by the hundred, both zeros, and minus infinity, which is never chosen."""
    scores_THM = (torch.randn(50, 3, places) * 2).round().to(dtype)
    scores_THM[torch.rand(scores_THM.shape) < 0.3] = -math.inf
    scores_THM[torch.rand(scores_THM.shape) < 0.1] = -0.0
    for count in range(places + 1):
        found = best(scores_THM, count).flatten(0, 1).tolist()
        for row, got in zip(scores_THM.flatten(0, 1).tolist(), found, strict=True):
            want = [m for m in sorted(range(places), key=lambda m: -row[m]) if row[m] > -math.inf][:count]
            assert got == want + [-1] * (count - len(want))


def test_extreme_scores():
    values = [math.inf, 3e38, 1e-45, 0.0, -1e-45, -3e38, -math.inf]
    order = torch.randperm(len(values))
    got = best(torch.tensor(values)[order][None, None], len(values))[0, 0]
    assert got.tolist() == [*order.argsort()[:-1].tolist(), -1]


def test_forced_blocks_come_first_and_lower_ones_before():
    chosen = choose(torch.randn(40, 2, 10), 0, 4, 5, previous=2, initial=1)
    assert chosen[39].tolist() == [[9, 0, 7, 8, chosen[39, 0, 4]], [9, 0, 7, 8, chosen[39, 1, 4]]]
    assert chosen[4].tolist() == [[1, 0, -1, -1, -1]] * 2


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("limit", [1, 50, 333])
def test_chunks_choose_as_one(together, limit, monkeypatch):
    q, k = torch.randn(37, 6, 8), torch.randn(51, 2, 8)
    means = block_means(k, 4, 0, 12)
    want = top_blocks(q, means, 14, 4, 3, together)
    monkeypatch.setattr(topk, "SCORES_AT_ONCE", limit)
    assert top_blocks(q, means, 14, 4, 3, together).equal(want)


def test_scores_are_never_all_there_at_once(monkeypatch):
    seen, score = [], topk._block_scores
    monkeypatch.setattr(topk, "_block_scores", lambda *args: seen.append(score(*args)) or seen[-1])
    monkeypatch.setattr(topk, "SCORES_AT_ONCE", 1000)
    top_blocks(torch.randn(200, 4, 8), torch.randn(20, 2, 8), 0, 10, 3)
    assert max(scores.numel() for scores in seen) <= 1000 < sum(scores.numel() for scores in seen)
