"""Selected and tiled attention on a CUDA device, against the dense mask in fp64: results and gradients."""

import math

import pytest
import torch
from cases import close
from torch import Tensor

from sextant.kernels.attention import Scores, Span
from sextant.kernels.attention import selected as module
from sextant.kernels.attention.parts import SCORES_AT_ONCE
from sextant.kernels.attention.selected import attend_selected_reference, attend_selected_sparse
from sextant.kernels.attention.span import Tiled
from sextant.kernels.attention.tiles import attend_tiles_reference, attend_tiles_sparse
from sextant.kernels.attention.topk import best, block_means, top_blocks

pytestmark = pytest.mark.gpu
GPU = "cuda"
HEADS = [(4, 2), (3, 1), (6, 6), (6, 2)]
LENGTHS = [(1, 200), (64, 64), (199, 199), (70, 333)]


def rows(tokens: int, keys: int, heads: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    """q and k of 32 channels, v of 48."""
    shapes = (tokens, heads, 32), (keys, groups, 32), (keys, groups, 48)
    return [torch.randn(shape, device=GPU).to(dtype).requires_grad_() for shape in shapes]


def results(attention, inputs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    o, lse = attention(*inputs)
    lse = lse.where(lse > -math.inf, 0.0)
    loss = (o.double() * weights[0]).sum() + (lse.double() * weights[1]).sum()
    return [x.detach().double() for x in (o, lse, *torch.autograd.grad(loss, inputs))]


def compare(fast, dense, inputs: list[Tensor]) -> None:
    """fp32 within 1e-5; bf16 with at most three times the error of the dense mask on the same bf16 rows.

    The dense mask multiplies in fp32, so what it loses is the rounding of its results alone; the parts also round
    probabilities to bf16, which is why a hundredth of the wanted norm is allowed beside it.
    """
    tokens, heads = inputs[0].shape[:2]
    weights = [torch.randn(tokens, heads, 48, device=GPU).double(), torch.randn(heads, tokens, device=GPU).double()]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want, got = results(dense, exact, weights), results(fast, inputs, weights)
    if inputs[0].dtype == torch.float32:
        for g, w in zip(got, want, strict=True):
            close(g, w, 2e-5)
        return
    for g, w, rival in zip(got, want, results(dense, inputs, weights), strict=True):
        assert (g - w).norm() <= 3 * (rival - w).norm() + 0.01 * w.norm()


@pytest.mark.parametrize("limit", [2**12, 2**26], ids=["small parts", "large parts"])
@pytest.mark.parametrize("gathers", [False, True], ids=["by blocks", "by queries"])
@pytest.mark.parametrize("per", ["head", "group", "all"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_selected_equals_the_reference(dtype, lengths, heads, per, gathers, limit, monkeypatch):
    monkeypatch.setattr(module, "_gathers", lambda choice: gathers)
    monkeypatch.setitem(SCORES_AT_ONCE, "cuda", limit)
    inputs, first = rows(*lengths, *heads, dtype), lengths[1] - lengths[0]
    means = block_means(inputs[1].detach(), 16, 0, lengths[1] // 16)
    blocks_THJ = top_blocks(inputs[0].detach(), means, first, 16, 4, together=per != "head")
    if per == "all":
        blocks_THJ = blocks_THJ[:, :1]
    blocks_THJ = blocks_THJ.masked_fill(torch.rand(blocks_THJ.shape, device=GPU) < 0.2, -1)

    def fast(*x: Tensor) -> tuple[Tensor, Tensor]:
        return attend_selected_sparse(*x, blocks_THJ, 16, Scores(0.2))

    def dense(*x: Tensor) -> tuple[Tensor, Tensor]:
        return attend_selected_reference(*x, blocks_THJ, 16, Scores(0.2))

    compare(fast, dense, inputs)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("span", [Span(50, sinks=3), Span()], ids=str)
def test_tiles_equal_the_reference(span, dtype, lengths, heads):
    """With ALiBi where three heads share keys."""
    slopes_H = torch.rand(heads[0], device=GPU) if heads[0] // heads[1] == 3 else None
    mask, how = Tiled(span), Scores(0.2, slopes_H)

    def fast(*x: Tensor) -> tuple[Tensor, Tensor]:
        return attend_tiles_sparse(*x, mask, how, 32)

    def dense(*x: Tensor) -> tuple[Tensor, Tensor]:
        return attend_tiles_reference(*x, mask, how)

    compare(fast, dense, rows(*lengths, *heads, dtype))


def test_choices_are_those_of_a_cpu():
    """Ties, too."""
    scores_THM = (torch.randn(300, 4, 70) * 2).round()
    assert best(scores_THM.to(GPU), 9).cpu().equal(best(scores_THM, 9))


def step_bytes(tokens: int) -> int:
    """What a step of eight heads over 16 blocks of 64 tokens allocates at most."""
    inputs = rows(tokens, tokens, 8, 2, torch.bfloat16)
    blocks_THJ = torch.randint(0, tokens // 64, (tokens, 2, 1), device=GPU) + torch.arange(16, device=GPU)
    blocks_THJ %= tokens // 64
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend_selected_sparse(*inputs, blocks_THJ, 64, Scores(0.2))[0].sum().backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_memory_grows_with_the_length_alone(monkeypatch):
    monkeypatch.setitem(SCORES_AT_ONCE, "cuda", 2**20)
    assert step_bytes(16384) < 2.3 * step_bytes(8192)
