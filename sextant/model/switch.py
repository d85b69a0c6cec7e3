"""Other attention for the same weights: parameter-free patterns change places, nothing else does.

A model trained with MoBA reads with full attention and back (spec sparse-attention 2, L17; 12.2).
"""

from __future__ import annotations

from collections.abc import Sequence

from sextant.axes.attention import Mixer, Pattern
from sextant.axes.attention.base import Attention
from sextant.core.cost import At
from sextant.core.errors import UsageError
from sextant.core.spec import Spec
from sextant.model.block import SelfAttention
from sextant.model.spec import Layer, ModelSpec
from sextant.model.transformer import Transformer


def attending(spec: ModelSpec, attention: Sequence[Spec], path: str = "attention") -> ModelSpec:
    """The same model with these patterns, one for each layer.

    Raises:
        UsageError: not one for each layer, or a change that would need other parameters.
    """
    if len(attention) != len(spec.layers):
        raise UsageError(
            "not one pattern for each layer", where=path, got=len(attention), expected=len(spec.layers),
            fix="Name a pattern for every layer, changed or not",
        )
    layers = []
    for index, (layer, pattern) in enumerate(zip(spec.layers, attention, strict=True)):
        if pattern != layer.attention:
            for one in (pattern, layer.attention):
                _require_bare(one, layer, spec.width, f"{path}[{index}]")
            layer = layer.replace(attention=pattern)
        layers.append(layer)
    return spec.replace(layers=tuple(layers))


def _require_bare(pattern: Spec, layer: Layer, width: int, where: str) -> None:
    fix = "Change only patterns without parameters"
    if isinstance(pattern, Mixer):
        raise UsageError(f"{pattern.kind} replaces the whole step, so weights would change", where=where, fix=fix)  # type: ignore[attr-defined]
    if isinstance(pattern, Pattern) and (own := pattern.cost(width, layer.projections, At(1)).params):
        kind = getattr(pattern, "kind", "")
        raise UsageError(f"{kind} has {own:,} parameters of its own, so weights would change", where=where, fix=fix)


def switch(model: Transformer, spec: ModelSpec) -> None:
    """Let the layers of a built model read as ``spec`` says, which :func:`attending` made; weights stay.

    A prediction module whose layer is the model's last one follows it.
    """
    for block, old, new in zip(model.all_blocks, model.spec.all_layers, spec.all_layers, strict=True):
        attention = block.attention
        if old.attention != new.attention and isinstance(attention, SelfAttention):
            attention.pattern = _built(new, spec.width, model).to(model.embedding.weight.device)
    model.spec = spec


def _built(layer: Layer, width: int, model: Transformer) -> Attention:
    if not isinstance(layer.attention, Pattern):
        raise TypeError(f"{layer.attention.kind} is not a pattern")
    return layer.attention.build(width, layer.projections, model.numerics)
