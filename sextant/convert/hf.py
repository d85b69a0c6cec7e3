"""Models from the transformers ecosystem: a ``config.json`` becomes a :class:`ModelSpec`, its tensors our parameters.

Nothing of transformers is imported. A field of the configuration that changes the function and that we do not have is
refused by name; a field that nobody here has heard of is refused too, because it might.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from sextant.axes.routing import SelectionBias
from sextant.convert.families import DEFAULTS, MODULES, READERS
from sextant.convert.fields import Fields
from sextant.convert.maps import Link, links
from sextant.convert.scaled import SCALE, Restored, read_quantisation, scale_problems
from sextant.core.errors import CheckpointError, UsageError, nearest
from sextant.core.spec import explain
from sextant.model.mtp import MTP
from sextant.model.spec import ModelSpec
from sextant.model.transformer import Transformer


def spec_from_hf(config: Mapping[str, Any], name: str | None = None, mtp: bool = False) -> ModelSpec:
    """The declaration of the model that a ``config.json`` describes.

    Args:
        config: its contents, of any transformers 4 or 5.
        name: of the model; by default the name it was saved under, or its family.
        mtp: with the prediction modules that the file tells of, whose tensors transformers leaves out when it saves.

    Raises:
        UsageError: unknown ``model_type``, or a field that is missing, unknown or unsupported, by name.
    """
    family = str(config.get("model_type"))
    if family not in READERS:
        fix = "Pass its text_config" if "text_config" in config else nearest(family, READERS)
        raise UsageError("unsupported model_type", where="config.json: model_type", got=repr(family), fix=fix)
    fields = Fields({**DEFAULTS[family], **config})
    read_quantisation(fields)
    try:
        spec = READERS[family](fields, name or config.get("_name_or_path") or family)
    except ValidationError as error:
        raise explain(error, {}, "config.json:") from None
    fields.done()
    return _with_modules(spec, config) if mtp else spec


def _with_modules(spec: ModelSpec, config: Mapping[str, Any]) -> ModelSpec:
    depth = next((config[name] for name in MODULES if config.get(name)), 0)
    if not depth:
        raise UsageError("no prediction modules in a model configuration", where=f"config.json: {MODULES[0]}")
    return spec.replace(mtp=MTP(depth=depth))


LEFTOVERS = (
    ".rotary_emb.inv_freq", ".self_attn.slope_rate", ".self_attn.query_decay", ".self_attn.key_decay",
    ".self_attn.diagonal_decay", SCALE,
)
"""Endings of tensors that hold no parameter: tables which some files carry and every model makes for itself, and the
scales of FP8 matrices, which have rules of their own.
"""


@torch.no_grad()
def import_weights(model: Transformer, tensors: Mapping[str, Tensor], family: str) -> None:
    """Fill a model from tensors under their names on disk, in any floating dtype; all or nothing.

    FP8 matrices with scales by block, as DeepSeek-V3 is released, are restored one after another.

    Args:
        model: with memory; parameters keep their dtype and device.
        tensors: every tensor of the checkpoint; may load lazily, each is asked for more than once.
        family: a key of :data:`~sextant.convert.maps.FAMILIES`, the checkpoint's ``model_type``.

    Raises:
        CheckpointError: missing, unexpected or mis-shaped tensors; the first five are named, and nothing was changed.
        UsageError: unknown family, or a model that is not of this family or has no memory.
    """
    ours = weights(model)
    if any(tensor.is_meta for tensor in ours.values()):
        raise UsageError("cannot import into a model without memory", got="device meta", fix="Build it on cpu")
    plan = list(links(family, {name: tensor.shape for name, tensor in ours.items()}))
    problems = [*_problems(plan, tensors, LEFTOVERS, _unused(model, tensors)), *scale_problems(tensors)]
    if problems:
        what = f"{len(problems)} tensors do not fit this {family} model"
        raise CheckpointError(what, where="; ".join(problems[:5]), fix="Use the config.json that came with the tensors")
    numbers = Restored(tensors)
    for link in plan:
        for name, tensor in link.join(numbers).items():
            ours[name].copy_(tensor)


def _problems(
    plan: list[Link], tensors: Mapping[str, Tensor], endings: tuple[str, ...], starts: tuple[str, ...]
) -> Iterator[str]:
    """Names with one of these endings or starts may be there."""
    expected = {name: shape for link in plan for name, shape in link.shapes.items()}
    for name, shape in expected.items():
        if name not in tensors:
            yield f"{name} got nothing, expected {list(shape)}"
        elif tensors[name].shape != shape:
            yield f"{name} got {list(tensors[name].shape)}, expected {list(shape)}"
        elif not tensors[name].is_floating_point():
            yield f"{name} got {tensors[name].dtype}, expected a floating dtype"
    for name in tensors:
        known = name in expected or name.endswith(endings) or name.startswith(starts)
        if not known and not _repeats(name, tensors):
            yield f"{name} got {list(tensors[name].shape)}, expected nothing"


_COPIES = {
    r"lm_head\.weight": "model.embed_tokens.weight",
    r"model\.layers\.\d+\.embed_tokens\.weight": "model.embed_tokens.weight",
    r"model\.layers\.\d+\.shared_head\.head\.weight": "lm_head.weight",
}
"""Tensors that some files hold twice: the one matrix of tied models, and both again for each prediction module."""


def _repeats(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Two that differ are not the same matrix."""
    original = next((tensors.get(first) for pattern, first in _COPIES.items() if re.fullmatch(pattern, name)), None)
    return original is not None and torch.equal(tensors[name], original)


def _unused(model: Transformer, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """How names of prediction modules begin, for a model without any: a file with them holds the model too."""
    marks = (re.fullmatch(r"(model\.layers\.\d+\.)eh_proj\.weight", name) for name in tensors)
    return tuple(mark[1] for mark in marks if mark) if model.spec.mtp is None else ()


def export_weights(model: Transformer, family: str) -> dict[str, Tensor]:
    """The parameters under the family's names on disk, contiguous; tensors that need no move share the model's memory.

    Raises:
        UsageError: unknown family, or a model that is not of this family; a tied one whose head is scaled (muP).
    """
    named = weights(model)
    if model.head_scale != 1:  # no file says so: the factor goes into the matrix
        if model.head is None:
            raise UsageError("a tied head with a factor has no place in a file", where="init", got=model.spec.init.kind)
        named["head.weight"] = model.head_PD.detach()
    return to_disk(named, family)


def weights(model: Transformer) -> dict[str, Tensor]:
    """What files hold of a model, outside the graph: its parameters, and the biases that steer its routers."""
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    biases = ((name, module) for name, module in model.named_modules() if isinstance(module, SelectionBias))
    return named | {f"{name}.value_E": module.value_E for name, module in biases}


def to_disk(tensors: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """Anything that has one tensor per parameter (weights, gradients, averages) under the family's names on disk.

    Raises:
        UsageError: as :func:`export_weights`.
    """
    plan = links(family, {name: tensor.shape for name, tensor in tensors.items()})
    return {name: part.contiguous() for link in plan for name, part in link.split(tensors).items()}
