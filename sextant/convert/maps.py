"""Which tensor of ours is which tensor on a hub's disk: one table per family, read from left to right.

A row holds our parameter names, the names in the safetensors files, and the move between them. ``{i}`` counts layers,
``{e}`` experts. Every move has an inverse, so the same rows import and export. Several names of ours stand for their
rows below one another. Names are those of files, not of modules
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
    """How tensors on disk become ours (``join``, which is told the first size of ours) and back (``split``, told how
    many names a row has).
    """

    join: Callable[[Sequence[Tensor], int], Tensor]
    split: Callable[[Tensor, int], list[Tensor]]


def _stack_transposed(parts: Sequence[Tensor], experts: int) -> Tensor:
    """Matrices ``[out, in]``, one or two for each expert, to ``[E, in, out]`` side by side."""
    ways = len(parts) // experts
    each = [torch.cat([part.t() for part in parts[at : at + ways]], dim=1) for at in range(0, len(parts), ways)]
    return torch.stack(each)


def _unstack_transposed(stack: Tensor, ways: int) -> list[Tensor]:
    return [part.t() for expert in stack for part in expert.chunk(ways, dim=1)]


def _tall_transposed(parts: Sequence[Tensor], experts: int) -> Tensor:
    """Matrices ``[E * out, in]`` to ``[E, in, out]`` side by side."""
    return torch.cat([part.unflatten(0, (experts, -1)).transpose(1, 2) for part in parts], dim=2)


def _untall_transposed(stack: Tensor, ways: int) -> list[Tensor]:
    return [part.transpose(1, 2).flatten(0, 1) for part in stack.chunk(ways, dim=2)]


SAME = Move(join=lambda parts, _: parts[0], split=lambda tensor, _: [tensor])
STACK = Move(join=_stack_transposed, split=_unstack_transposed)
TALL_TRANSPOSED = Move(join=_tall_transposed, split=_untall_transposed)
TALL = Move(join=lambda parts, n: parts[0].unflatten(0, (n, -1)), split=lambda tensor, _: [tensor.flatten(0, 1)])
ROWS = Move(join=lambda parts, _: torch.cat(list(parts)), split=lambda tensor, ways: list(tensor.chunk(ways)))
PER_HEAD = Move(join=lambda parts, _: parts[0].flatten(), split=lambda tensor, _: [tensor.view(1, 1, -1, 1)])


@dataclass(frozen=True)
class Row:
    """One line of a map: ``ours <- theirs``, with what happens on the way."""

    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    move: Move = SAME

    @property
    def our_names(self) -> tuple[str, ...]:
        """Ours as a tuple."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def their_names(self) -> tuple[str, ...]:
        """Theirs as a tuple."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


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
BIASES = (
    Row("blocks.{i}.attention.kv.q.bias", "model.layers.{i}.self_attn.q_proj.bias"),
    Row("blocks.{i}.attention.kv.k.bias", "model.layers.{i}.self_attn.k_proj.bias"),
    Row("blocks.{i}.attention.kv.v.bias", "model.layers.{i}.self_attn.v_proj.bias"),
)
SINKS = (Row("blocks.{i}.attention.pattern.sinks_H", "model.layers.{i}.self_attn.sinks"),)  # gpt-oss
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
MLA = (
    Row("blocks.{i}.attention.kv.q.weight", "model.layers.{i}.self_attn.q_proj.weight"),  # without a query latent
    Row("blocks.{i}.attention.kv.q.down.weight", "model.layers.{i}.self_attn.q_a_proj.weight"),
    Row("blocks.{i}.attention.kv.q.down.bias", "model.layers.{i}.self_attn.q_a_proj.bias"),
    Row("blocks.{i}.attention.kv.q.norm.gain", "model.layers.{i}.self_attn.q_a_layernorm.weight"),
    Row("blocks.{i}.attention.kv.q.up.weight", "model.layers.{i}.self_attn.q_b_proj.weight"),
    Row("blocks.{i}.attention.kv.kv_a.weight", "model.layers.{i}.self_attn.kv_a_proj_with_mqa.weight"),
    Row("blocks.{i}.attention.kv.kv_a.bias", "model.layers.{i}.self_attn.kv_a_proj_with_mqa.bias"),
    Row("blocks.{i}.attention.kv.kv_norm.gain", "model.layers.{i}.self_attn.kv_a_layernorm.weight"),
    Row("blocks.{i}.attention.kv.kv_b.weight", "model.layers.{i}.self_attn.kv_b_proj.weight"),
    Row("blocks.{i}.attention.kv.o.weight", "model.layers.{i}.self_attn.o_proj.weight"),
    Row("blocks.{i}.attention.kv.o.bias", "model.layers.{i}.self_attn.o_proj.bias"),
)
LIGHTNING = (  # rows of qkv go by head on both sides
    Row("blocks.{i}.attention.mixer.qkv.weight", "model.layers.{i}.self_attn.qkv_proj.weight"),
    Row("blocks.{i}.attention.mixer.gate.weight", "model.layers.{i}.self_attn.output_gate.weight"),
    Row("blocks.{i}.attention.mixer.o.weight", "model.layers.{i}.self_attn.out_proj.weight"),
    Row("blocks.{i}.attention.mixer.norm.gain", "model.layers.{i}.self_attn.norm.weight"),
)
_GATED_DELTA = "model.layers.{i}.linear_attn"
GATED_DELTA = (  # Qwen3-Next's linear layers; rows of qkvz and ba go by key head on both sides
    Row("blocks.{i}.attention.mixer.qkvz.weight", f"{_GATED_DELTA}.in_proj_qkvz.weight"),
    Row("blocks.{i}.attention.mixer.ba.weight", f"{_GATED_DELTA}.in_proj_ba.weight"),
    Row("blocks.{i}.attention.mixer.core.conv.weight", f"{_GATED_DELTA}.conv1d.weight"),
    Row("blocks.{i}.attention.mixer.forget.rate_log_H", f"{_GATED_DELTA}.A_log"),
    Row("blocks.{i}.attention.mixer.forget.bias", f"{_GATED_DELTA}.dt_bias"),
    Row("blocks.{i}.attention.mixer.norm.gain", f"{_GATED_DELTA}.norm.weight"),
    Row("blocks.{i}.attention.mixer.o.weight", f"{_GATED_DELTA}.out_proj.weight"),
)
_KDA = "model.layers.{i}.self_attn"
KDA = (  # Kimi Linear's
    Row("blocks.{i}.attention.mixer.q.weight", f"{_KDA}.q_proj.weight"),
    Row("blocks.{i}.attention.mixer.k.weight", f"{_KDA}.k_proj.weight"),
    Row("blocks.{i}.attention.mixer.v.weight", f"{_KDA}.v_proj.weight"),
    Row("blocks.{i}.attention.mixer.beta.weight", f"{_KDA}.b_proj.weight"),
    Row("blocks.{i}.attention.mixer.decay_down.weight", f"{_KDA}.f_a_proj.weight"),
    Row("blocks.{i}.attention.mixer.decay_up.weight", f"{_KDA}.f_b_proj.weight"),
    Row("blocks.{i}.attention.mixer.gate_down.weight", f"{_KDA}.g_a_proj.weight"),
    Row("blocks.{i}.attention.mixer.gate_up.weight", f"{_KDA}.g_b_proj.weight"),
    Row("blocks.{i}.attention.mixer.core.conv.weight", tuple(f"{_KDA}.{x}_conv1d.weight" for x in "qkv"), ROWS),
    Row("blocks.{i}.attention.mixer.forget.rate_log_H", f"{_KDA}.A_log", PER_HEAD),
    Row("blocks.{i}.attention.mixer.forget.bias", f"{_KDA}.dt_bias"),
    Row("blocks.{i}.attention.mixer.norm.gain", f"{_KDA}.o_norm.weight"),
    Row("blocks.{i}.attention.mixer.o.weight", f"{_KDA}.o_proj.weight"),
)
_INDEXER = "model.layers.{i}.self_attn.indexer"
INDEXER = (
    Row("blocks.{i}.attention.pattern.indexer.q.weight", f"{_INDEXER}.wq_b.weight"),
    Row("blocks.{i}.attention.pattern.indexer.k.weight", f"{_INDEXER}.wk.weight"),
    Row("blocks.{i}.attention.pattern.indexer.k_norm.gain", f"{_INDEXER}.k_norm.weight"),
    Row("blocks.{i}.attention.pattern.indexer.k_norm.bias", f"{_INDEXER}.k_norm.bias"),
    Row("blocks.{i}.attention.pattern.indexer.weights.weight", f"{_INDEXER}.weights_proj.weight"),
)
_FINE = "model.layers.{i}.mlp.experts.{e}"
FINE_EXPERTS = (  # many small ones
    Row("blocks.{i}.feed_forward.router.weight", "model.layers.{i}.mlp.gate.weight"),
    Row("blocks.{i}.feed_forward.experts.up_EDF", (f"{_FINE}.gate_proj.weight", f"{_FINE}.up_proj.weight"), STACK),
    Row("blocks.{i}.feed_forward.experts.down_EFD", f"{_FINE}.down_proj.weight", STACK),
)
SHARED_EXPERTS = (  # side by side as one
    Row("blocks.{i}.feed_forward.shared.gate.weight", "model.layers.{i}.mlp.shared_experts.gate_proj.weight"),
    Row("blocks.{i}.feed_forward.shared.up.weight", "model.layers.{i}.mlp.shared_experts.up_proj.weight"),
    Row("blocks.{i}.feed_forward.shared.down.weight", "model.layers.{i}.mlp.shared_experts.down_proj.weight"),
)
SELECTION_BIAS = (
    Row("blocks.{i}.feed_forward.router.bias.value_E", "model.layers.{i}.mlp.gate.e_score_correction_bias"),
)
_EXPERT = "model.layers.{i}.block_sparse_moe.experts.{e}"
EXPERTS = (  # w1 is the gate, w3 the value, w2 the way back
    Row("blocks.{i}.feed_forward.router.weight", "model.layers.{i}.block_sparse_moe.gate.weight"),
    Row("blocks.{i}.feed_forward.experts.up_EDF", (f"{_EXPERT}.w1.weight", f"{_EXPERT}.w3.weight"), STACK),
    Row("blocks.{i}.feed_forward.experts.down_EFD", f"{_EXPERT}.w2.weight", STACK),
)
_SWITCH = "encoder.block.{i}.layer.1.mlp"
SWITCH_EXPERTS = (  # the sparse layer alone: an encoder and a decoder around it are not ours
    Row("blocks.{i}.feed_forward.router.weight", f"{_SWITCH}.router.classifier.weight"),
    Row("blocks.{i}.feed_forward.experts.up_EDF", f"{_SWITCH}.experts.expert_{{e}}.wi.weight", STACK),
    Row("blocks.{i}.feed_forward.experts.down_EFD", f"{_SWITCH}.experts.expert_{{e}}.wo.weight", STACK),
)
_DBRX = "transformer.blocks.{i}"
DBRX = (  # queries, keys and values as one; every matrix of the experts as one tall one
    Row("embedding.weight", "transformer.wte.weight"),
    Row("norm.gain", "transformer.norm_f.weight"),
    Row("head.weight", "lm_head.weight"),
    Row("blocks.{i}.around_attention.norm.gain", f"{_DBRX}.norm_attn_norm.norm_1.weight"),
    Row("blocks.{i}.around_feed_forward.norm.gain", f"{_DBRX}.norm_attn_norm.norm_2.weight"),
    Row(
        ("blocks.{i}.attention.kv.q.weight", "blocks.{i}.attention.kv.k.weight", "blocks.{i}.attention.kv.v.weight"),
        f"{_DBRX}.norm_attn_norm.attn.Wqkv.weight",
    ),
    Row("blocks.{i}.attention.kv.o.weight", f"{_DBRX}.norm_attn_norm.attn.out_proj.weight"),
    Row("blocks.{i}.feed_forward.router.weight", f"{_DBRX}.ffn.router.layer.weight"),
    Row(
        "blocks.{i}.feed_forward.experts.up_EDF", (f"{_DBRX}.ffn.experts.mlp.w1", f"{_DBRX}.ffn.experts.mlp.v1"),
        TALL_TRANSPOSED,
    ),
    Row("blocks.{i}.feed_forward.experts.down_EFD", f"{_DBRX}.ffn.experts.mlp.w2", TALL),
)

MODULES = (  # DeepSeek-V3's: layers past the last, whose blocks are as all others
    Row("mtp.{i}.embedding_norm.gain", "model.layers.{i}.enorm.weight"),
    Row("mtp.{i}.hidden_norm.gain", "model.layers.{i}.hnorm.weight"),
    Row("mtp.{i}.project.weight", "model.layers.{i}.eh_proj.weight"),
    Row("mtp.{i}.norm.gain", "model.layers.{i}.shared_head.norm.weight"),
)

FAMILIES: dict[str, tuple[Row, ...]] = {
    "llama": ENDS + ATTENTION + PRE_NORMS + DENSE,
    "mistral": ENDS + ATTENTION + PRE_NORMS + DENSE,
    "mixtral": ENDS + ATTENTION + PRE_NORMS + EXPERTS,
    "olmoe": ENDS + ATTENTION + QK_NORMS + PRE_NORMS + FINE_EXPERTS,
    "qwen3_moe": ENDS + ATTENTION + QK_NORMS + PRE_NORMS + DENSE + FINE_EXPERTS,
    "dbrx": DBRX,
    "deepseek_v2": ENDS + MLA + PRE_NORMS + DENSE + FINE_EXPERTS + SHARED_EXPERTS,
    "deepseek_v3": ENDS + MLA + PRE_NORMS + DENSE + FINE_EXPERTS + SHARED_EXPERTS + SELECTION_BIAS + MODULES,
    "deepseek_v32": (
        ENDS + MLA + INDEXER + PRE_NORMS + DENSE + FINE_EXPERTS + SHARED_EXPERTS + SELECTION_BIAS + MODULES
    ),
    "minimax": ENDS + ATTENTION + LIGHTNING + PRE_NORMS + EXPERTS,
    "minimax_text_01": ENDS + ATTENTION + LIGHTNING + PRE_NORMS + EXPERTS,
    "minimax_m1": ENDS + ATTENTION + LIGHTNING + PRE_NORMS + EXPERTS,
    "gemma3_text": ENDS + ATTENTION + QK_NORMS + SANDWICH_NORMS + DENSE,
}
"""``model_type`` -> map."""


@dataclass(frozen=True)
class Link:
    """A row applied to the parameters of one layer.

    Attributes:
        ours: our name -> shape; one, or several whose rows lie below one another.
        shapes: disk name -> shape of the tensor there, in the order that ``join`` takes them.
    """

    ours: dict[str, torch.Size]
    shapes: dict[str, torch.Size]
    row: Row

    def join(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors by name, from those on disk."""
        rows = [shape[0] for shape in self.ours.values()]
        whole = self.row.move.join([tensors[name] for name in self.shapes], sum(rows))
        return dict(zip(self.ours, whole.split(rows), strict=True))

    def split(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors on disk, from ours."""
        parts = [tensors[name] for name in self.ours]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return dict(zip(self.shapes, self.row.move.split(whole, len(self.row.their_names)), strict=True))


def family_map(family: str) -> tuple[Row, ...]:
    """The rows of a family.

    Raises:
        UsageError: there is no map for it.
    """
    if family not in FAMILIES:
        raise UsageError("no weight map for this family", got=repr(family), fix=nearest(family, FAMILIES))
    return FAMILIES[family]


def links(family: str, shapes: Mapping[str, torch.Size]) -> Iterator[Link]:
    """The family's map for parameters with these names and shapes; some may be missing, as gradients are.

    Raises:
        UsageError: unknown family, or a parameter that the family does not have.
    """
    rows = {name: row for row in family_map(family) for name in row.our_names}
    layers = 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")), default=-1)
    for name in shapes:
        owner, pattern = _place(name)
        if pattern not in rows:
            fix = "Export it as another family, or change the declaration"
            raise UsageError(f"the {family} family has no such parameter", where=name, fix=fix)
        if pattern == rows[pattern].our_names[0]:
            number = int(owner.split(".")[1]) if owner else 0
            yield _link(rows[pattern], owner, number + layers if owner.startswith("mtp") else number, shapes)


_OWNER = re.compile(r"blocks\.\d+|mtp\.\d+\.block(?=\.)|mtp\.\d+")


def _place(name: str) -> tuple[str, str]:
    """The layer or prediction module that a parameter is of, and its pattern: a module's block is a block."""
    match = _OWNER.match(name)
    if match is None:
        return "", name
    kind = "mtp" if re.fullmatch(r"mtp\.\d+", match[0]) else "blocks"
    return match[0], f"{kind}.{{i}}{name.removeprefix(match[0])}"


def _link(row: Row, owner: str, layer: int, shapes: Mapping[str, torch.Size]) -> Link:
    """``owner`` says where on our side, ``layer`` is the number on theirs."""
    names = (re.sub(r"^(blocks|mtp)\.\{i\}", owner, pattern) for pattern in row.our_names)
    ours = {name: shapes[name] for name in names}
    first = next(iter(ours.values()))
    whole = torch.Size([sum(shape[0] for shape in ours.values()), *first[1:]])
    experts = range(first[0] if row.move is STACK else 1)
    names = [pattern.format(i=layer, e=expert) for expert in experts for pattern in row.their_names]
    parts = row.move.split(torch.empty(whole, device="meta"), len(row.their_names))
    return Link(ours, {n: part.shape for n, part in zip(names, parts, strict=True)}, row)
