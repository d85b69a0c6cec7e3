"""Attention under static masks by tiles against the dense mask in fp64: results and gradients."""

import math

import pytest
import torch
from cases import close
from torch import Tensor

from sextant.kernels.attention import Scores
from sextant.kernels.attention import tiles as module
from sextant.kernels.attention.parts import SCORES_AT_ONCE
from sextant.kernels.attention.tiles import attend_tiles, attend_tiles_reference, attend_tiles_sparse, occupied

K, V, TILE = 7, 5, 8
HEADS = [(4, 2), (3, 1), (6, 6), (6, 2)]
LENGTHS = {
    "one token": (1, 1),
    "a tile": (8, 8),
    "a tile and one": (9, 9),
    "six tiles and two": (50, 50),
    "one token after many": (1, 37),
    "a chunk after many": (21, 43),
}
RANDOM = torch.rand(64, 64, generator=torch.Generator().manual_seed(5)) < 0.1


class Mask:
    """A rule on two places, with the tiles that it fills or with all tiles."""

    def __init__(self, rule, exact: bool = True):
        self.rule, self.exact = rule, exact

    def visible(self, q_NT: Tensor, k_NS: Tensor) -> Tensor:
        return self.rule(q_NT[..., None, :, None], k_NS[..., None, None, :])

    def tiles(self, first: int, stop: int, tile: int) -> Tensor:
        found = occupied(self, first, stop, tile)
        return found if self.exact else torch.ones_like(found)


def by_head(q: Tensor, k: Tensor) -> Tensor:
    """Spans of 2, 4, 6 ... keys, which the shape tells for up to 6 heads."""
    return q - k < torch.arange(2, 14, 2)[: by_head.heads, None, None]  # type: ignore[attr-defined]


MASKS = {
    "window and sinks": Mask(lambda q, k: (q - k < 5) | (k < 2)),
    "dilated": Mask(lambda q, k: ((q - k) % 3 == 0) & (q - k < 20)),
    "random pairs": Mask(lambda q, k: RANDOM[q.clamp_max(63), k.clamp_max(63)]),
    "spans by head": Mask(by_head),
    "all": Mask(lambda q, k: k <= q, exact=False),
    "nothing before 20": Mask(lambda q, k: (q >= 20) & (k >= q - 9), exact=False),
}


@pytest.fixture(params=["large parts", "small parts"])
def _parts(request, monkeypatch):
    if request.param == "small parts":
        monkeypatch.setitem(SCORES_AT_ONCE, "cpu", 100)


def rows(tokens: int, keys: int, heads: int, groups: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    by_head.heads = heads  # type: ignore[attr-defined]
    shapes = (tokens, heads, K), (keys, groups, K), (keys, groups, V)
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


def results(attention, inputs, weights, *rest) -> list[Tensor]:
    o, lse = attention(*inputs, *rest)
    lse = lse.where(lse > -math.inf, 0.0)
    return [o, lse, *torch.autograd.grad((o * weights[0]).sum() + (lse * weights[1]).sum(), inputs)]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.usefixtures("_parts")
def test_equals_the_reference(mask, lengths, heads):
    """Two of the shapes have ALiBi."""
    inputs = rows(*lengths, *heads)
    weights = torch.randn(lengths[0], heads[0], V).double(), torch.randn(heads[0], lengths[0]).double()
    how = Scores(0.4, torch.rand(heads[0], dtype=torch.float64) if heads[0] // heads[1] == 3 else None)
    want = results(attend_tiles_reference, inputs, weights, mask, how)
    for got, wanted in zip(results(attend_tiles_sparse, inputs, weights, mask, how, TILE), want, strict=True):
        close(got, wanted, 1e-10)


def test_fp32():
    inputs, mask = rows(50, 50, 4, 2, torch.float32), MASKS["window and sinks"]
    weights = torch.randn(50, 4, V), torch.randn(4, 50)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = results(attend_tiles_reference, exact, [x.double() for x in weights], mask, Scores(0.4))
    for got, wanted in zip(results(attend_tiles_sparse, inputs, weights, mask, Scores(0.4), TILE), want, strict=True):
        close(got.double(), wanted, 1e-5)


def test_occupied_is_what_brute_force_finds():
    mask, first, stop, tile = MASKS["dilated"], 11, 30, 4
    found = occupied(mask, first, stop, tile)
    assert found.shape == (1, 6, 8)
    for row in range(6):
        for column in range(8):
            queries, keys = range((2 + row) * 4, min((3 + row) * 4, stop)), range(column * 4, column * 4 + 4)
            distances = [q - k for q in queries for k in keys]
            assert found[0, row, column] == any(0 <= d < 20 and d % 3 == 0 for d in distances)


def scored(tokens: int, monkeypatch) -> int:
    """Pairs of query and key that a window of 64 computes."""
    pairs, cut = [], module._part

    def counting(*arguments):
        part = cut(*arguments)
        pairs.append(part.rows_MT.numel() * part.keys_MS.shape[1])
        return part

    monkeypatch.setattr(module, "_part", counting)
    mask = Mask(lambda q, k: q - k < 64)
    attend_tiles(*rows(tokens, tokens, 4, 2, torch.float32), mask, Scores(0.4), 64)
    monkeypatch.undo()
    return sum(pairs)


def test_work_grows_with_the_length_and_the_window(monkeypatch):
    """Two tiles for every tile of queries, but for the first."""
    for tokens in (512, 1024):
        assert scored(tokens, monkeypatch) == 4 * 64 * 64 * (2 * tokens // 64 - 1)


def test_parts_are_bounded(monkeypatch):
    monkeypatch.setitem(SCORES_AT_ONCE, "cpu", 2**15)
    largest, cut = [], module._part

    def measuring(*arguments):
        part = cut(*arguments)
        largest.append(part.rows_MT.numel() * part.keys_MS.shape[1])
        return part

    monkeypatch.setattr(module, "_part", measuring)
    attend_tiles(*rows(512, 512, 4, 2, torch.float32), MASKS["all"], Scores(0.4), 64)
    assert max(largest) <= 2**15


def test_long_sequences_take_the_tiles(monkeypatch):
    monkeypatch.setattr(module, "attend_tiles_reference", None)
    inputs, mask = rows(300, 300, 4, 2), MASKS["window and sinks"]
    got = attend_tiles(*inputs, mask, Scores(0.4), 32)[0]
    close(got, attend_tiles_reference(*inputs, mask, Scores(0.4))[0], 1e-12)
