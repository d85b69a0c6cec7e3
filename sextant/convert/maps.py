"""Which tensor of ours is which tensor on a hub's disk: one table per family, read from left to right.

A row holds our parameter name, the names in the safetensors files, and the move between them. ``{i}`` counts layers,
``{e}`` experts. Every move has an inverse, so the same rows import and export. Names are those of files, not of modules
in memory: transformers 5 fuses experts when it loads and takes them apart again when it saves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sextant.core.errors import UsageError, nearest


@dataclass(frozen=True)
class Move:
    """How tensors on disk become one of ours (``join``) and back (``split``); both take a row's number of names."""

    join: Callable[[Sequence[Tensor], int], Tensor]
    split: Callable[[Tensor, int], list[Tensor]]


def _stack_transposed(parts: Sequence[Tensor], ways: int) -> Tensor:
    """Matrices ``[out, in]``, ``ways`` for each expert, to ``[E, in, ways * out]``."""
    experts = [torch.cat([part.t() for part in parts[at : at + ways]], dim=1) for at in range(0, len(parts), ways)]
    return torch.stack(experts)


def _unstack_transposed(stack: Tensor, ways: int) -> list[Tensor]:
    return [part.t() for expert in stack for part in expert.chunk(ways, dim=1)]


SAME = Move(join=lambda parts, ways: parts[0], split=lambda tensor, ways: [tensor])
STACK = Move(join=_stack_transposed, split=_unstack_transposed)


@dataclass(frozen=True)
class Row:
    """One line of a map: ``ours <- theirs``, with what happens on the way."""

    ours: str
    theirs: str | tuple[str, ...]
    move: Move = SAME


ENDS = (
    Row("embedding.weight", "model.embed_tokens.weight"),
    Row("norm.gain", "model.norm.weight"),
    Row("head.weight", "lm_head.weight"),  # not there when tied
)
ATTENTION = (
    Row("blocks.{i}.attention.kv.q.weight", "model.layers.{i}.self_attn.q_proj.weight"),
    Row("blocks.{i}.attention.kv.k.weight", "model.layers.{i}.self_attn.k_proj.weight"),
    Row("blocks.{i}.attention.kv.v.weight", "model.layers.{i}.self_attn.v_proj.weight"),
    Row("blocks.{i}.attention.kv.o.weight", "model.layers.{i}.self_attn.o_proj.weight"),
)
QK_NORMS = (
    Row("blocks.{i}.attention.kv.q_norm.gain", "model.layers.{i}.self_attn.q_norm.weight"),
    Row("blocks.{i}.attention.kv.k_norm.gain", "model.layers.{i}.self_attn.k_norm.weight"),
)
PRE_NORMS = (
    Row("blocks.{i}.around_attention.norm.gain", "model.layers.{i}.input_layernorm.weight"),
    Row("blocks.{i}.around_feed_forward.norm.gain", "model.layers.{i}.post_attention_layernorm.weight"),
)
SANDWICH_NORMS = (  # "post_attention" stands before the feed-forward above, and after the attention here
    Row("blocks.{i}.around_attention.norm.gain", "model.layers.{i}.input_layernorm.weight"),
    Row("blocks.{i}.around_attention.norm_out.gain", "model.layers.{i}.post_attention_layernorm.weight"),
    Row("blocks.{i}.around_feed_forward.norm.gain", "model.layers.{i}.pre_feedforward_layernorm.weight"),
    Row("blocks.{i}.around_feed_forward.norm_out.gain", "model.layers.{i}.post_feedforward_layernorm.weight"),
)
DENSE = (
    Row("blocks.{i}.feed_forward.gate.weight", "model.layers.{i}.mlp.gate_proj.weight"),
    Row("blocks.{i}.feed_forward.up.weight", "model.layers.{i}.mlp.up_proj.weight"),
    Row("blocks.{i}.feed_forward.down.weight", "model.layers.{i}.mlp.down_proj.weight"),
)
_EXPERT = "model.layers.{i}.block_sparse_moe.experts.{e}"
EXPERTS = (  # w1 is the gate, w3 the value, w2 the way back
    Row("blocks.{i}.feed_forward.router.weight", "model.layers.{i}.block_sparse_moe.gate.weight"),
    Row("blocks.{i}.feed_forward.experts.up_EDF", (f"{_EXPERT}.w1.weight", f"{_EXPERT}.w3.weight"), STACK),
    Row("blocks.{i}.feed_forward.experts.down_EFD", f"{_EXPERT}.w2.weight", STACK),
)

FAMILIES: dict[str, tuple[Row, ...]] = {
    "llama": ENDS + ATTENTION + PRE_NORMS + DENSE,
    "mistral": ENDS + ATTENTION + PRE_NORMS + DENSE,
    "mixtral": ENDS + ATTENTION + PRE_NORMS + EXPERTS,
    "gemma3_text": ENDS + ATTENTION + QK_NORMS + SANDWICH_NORMS + DENSE,
}
"""``model_type`` -> map."""


@dataclass(frozen=True)
class Link:
    """A row applied to one parameter.

    Attributes:
        ours: our parameter's name.
        shapes: disk name -> shape of the tensor there, in the order that ``join`` takes them.
    """

    ours: str
    shapes: dict[str, torch.Size]
    move: Move
    ways: int

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Our tensor, from those on disk."""
        return self.move.join([tensors[name] for name in self.shapes], self.ways)

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """The tensors on disk, from ours."""
        return dict(zip(self.shapes, self.move.split(tensor, self.ways), strict=True))


def family_map(family: str) -> tuple[Row, ...]:
    """The rows of a family.

    Raises:
        UsageError: there is no map for it.
    """
    if family not in FAMILIES:
        raise UsageError("no weight map for this family", got=repr(family), fix=nearest(family, FAMILIES))
    return FAMILIES[family]


def links(family: str, shapes: Mapping[str, torch.Size]) -> Iterator[Link]:
    """The family's map for parameters with these names and shapes.

    Raises:
        UsageError: unknown family, or a parameter that the family does not have.
    """
    rows = {row.ours: row for row in family_map(family)}
    for name, shape in shapes.items():
        pattern = re.sub(r"^blocks\.\d+\.", "blocks.{i}.", name)
        if pattern not in rows:
            fix = "Export it as another family, or change the declaration"
            raise UsageError(f"the {family} family has no such parameter", where=name, fix=fix)
        yield _link(rows[pattern], name, shape)


def _link(row: Row, name: str, shape: torch.Size) -> Link:
    theirs = (row.theirs,) if isinstance(row.theirs, str) else row.theirs
    layer = name.split(".")[1]
    experts = range(shape[0] if row.move is STACK else 1)
    names = [pattern.format(i=layer, e=expert) for expert in experts for pattern in theirs]
    parts = row.move.split(torch.empty(shape, device="meta"), len(theirs))
    return Link(name, {n: part.shape for n, part in zip(names, parts, strict=True)}, row.move, len(theirs))
