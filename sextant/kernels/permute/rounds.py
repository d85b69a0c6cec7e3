"""Experts in rounds of at most so many rows, which keep nothing of a round for the backward (MAI-Base-1, 8.4).

Rows go through an expert in tiles: products of one row count, whatever the load and the number of rounds, so that one
round and many give the same bits. (A CPU's fp32 product has other bits for another row count, and may have them for
memory that is aligned otherwise: a tile has its own.) Weight gradients are added up tile by tile, in the order of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sextant.kernels.permute import Plan, rows, summed, taken, weighted

Body = Callable[..., Tensor]
"""Rows ``[n, D]`` and the matrices of one expert to rows ``[n, D]``."""


def in_rounds(
    body: Body, x_TD: Tensor, gates_TA: Tensor, stacks: Sequence[Tensor], where: Plan, tile: int, cap: int
) -> Tensor:
    """Dispatch, experts and combine: ``out_t = sum_a gates_ta * body(x_t, matrices of expert a)``.

    Args:
        body: what one expert computes; differentiated by autograd, tile by tile, in the backward.
        x_TD: the tokens.
        gates_TA: fp32.
        stacks: the experts' matrices, each ``[E, ...]``.
        where: a plan whose shares are multiples of ``tile``.
        tile: rows of one product.
        cap: rows of one round, a multiple of ``tile``.
    """
    return _Rounds.apply(body, where, (tile, cap), x_TD, gates_TA, *stacks)  # type: ignore[return-value]


class _Rounds(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, body: Body, where: Plan, sizes: tuple[int, int], x_TD: Tensor, gates_TA: Tensor, *stacks: Tensor
    ) -> Tensor:
        ctx.body, ctx.where, ctx.sizes = body, where, sizes
        ctx.save_for_backward(x_TD, gates_TA, *stacks)
        slots_ND = x_TD.new_empty(len(where.source_N), x_TD.shape[1])
        for expert, here, (x,) in _tiles(where, sizes, gates_TA.shape[1], x_TD):
            slots_ND[here] = body(x, *(stack[expert] for stack in stacks))
        return weighted(slots_ND, gates_TA, where.row_N, where.kept_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gates_TA, *stacks = ctx.saved_tensors
        where, copies = ctx.where, gates_TA.shape[1]
        gates_N = gates_TA.flatten().index_select(0, where.source_N)
        dslots_ND, dgates_N = x_TD.new_empty(len(gates_N), x_TD.shape[1]), torch.empty_like(gates_N)
        dstacks = [torch.zeros_like(stack) for stack in stacks]
        for expert, here, (x, dout) in _tiles(where, ctx.sizes, copies, x_TD, grads[0]):
            leaves = [part.detach().requires_grad_() for part in (x, *(stack[expert] for stack in stacks))]
            dgates_N[here], dslots_ND[here], *parts = _gradients(ctx.body, leaves, dout, gates_N[here])
            for dstack, part in zip(dstacks, parts, strict=True):
                dstack[expert] += part
        dx_TD = summed(dslots_ND, where.row_N.view(-1, copies), where.kept_N)
        dgates_TA = taken(dgates_N, where.row_N, where.kept_N).view_as(gates_TA) if len(gates_N) else gates_TA * 0
        return None, None, None, dx_TD, dgates_TA, *dstacks


def _tiles(
    where: Plan, sizes: tuple[int, int], copies: int, *of_tokens: Tensor
) -> Iterator[tuple[int, slice, list[Tensor]]]:
    """Expert, place among all rows, and rows of each tile; those of a round are gathered when it begins."""
    tile, cap = sizes
    held_N = torch.ones_like(where.source_N, dtype=torch.bool)
    if where.zeros is not None:
        held_N[where.zeros] = False
    tiles_E = where.counts_E.div(tile, rounding_mode="floor")
    experts = torch.arange(len(tiles_E), device=tiles_E.device).repeat_interleave(tiles_E).tolist()
    for start in range(0, len(held_N), cap):
        source, zeros = where.source_N[start : start + cap], (~held_N[start : start + cap]).nonzero()[:, 0]
        gathered = [rows(part, source, zeros, copies).split(tile) for part in of_tokens]
        for index, parts in enumerate(zip(*gathered, strict=True)):
            here = slice(start + index * tile, start + (index + 1) * tile)
            yield experts[here.start // tile], here, [part.clone() for part in parts]


def _gradients(body: Body, leaves: list[Tensor], dout: Tensor, gates: Tensor) -> list[Tensor]:
    """By gates, rows and matrices of one tile, which is computed once more."""
    with torch.enable_grad():
        y = body(*leaves)
    dgates = torch.linalg.vecdot(y.detach().to(dout.dtype), dout)
    return [dgates, *torch.autograd.grad(y, leaves, (dout * gates[:, None]).to(y.dtype))]
