"""Whether a record of choices was made by such a model, for such a stream."""

from __future__ import annotations

from collections.abc import Iterator

from sextant.axes.attention.base import SelectingPattern
from sextant.axes.capacity import Experts
from sextant.core.errors import UsageError
from sextant.core.trace import Trace
from sextant.model.spec import Layer, ModelSpec


def check_replay(spec: ModelSpec, trace: Trace, tokens: int) -> None:
    """Refuse a record that the layers could not follow.

    Raises:
        UsageError: another number of tokens, layers that route or select here and not there or the other way round,
            other experts, another ``top_k``, another block. What goes wrong inside a layer is refused there.
    """
    if trace.tokens != tokens:
        raise UsageError("the record is of other tokens", got=f"{trace.tokens} tokens", expected=tokens)
    for where, what, got, expected in _differences(spec, trace):
        raise UsageError(f"the record is of another model: {what}", where=where, got=got, expected=expected)


def _differences(spec: ModelSpec, trace: Trace) -> Iterator[tuple[str, str, object, object]]:
    for index in sorted({*trace.routes, *trace.reads}):
        if index >= len(spec.layers):
            yield f"layers[{index}]", "layer count", index + 1, len(spec.layers)
    for index, layer in enumerate(spec.layers):
        yield from _routes_otherwise(index, layer, trace)
        yield from _reads_otherwise(index, layer, trace)


def _routes_otherwise(index: int, layer: Layer, trace: Trace) -> Iterator[tuple[str, str, object, object]]:
    where, routes, feed_forward = f"layers[{index}].feed_forward", trace.routes.get(index), layer.feed_forward
    wanted = isinstance(feed_forward, Experts)
    if wanted != (routes is not None):
        yield where, "experts", "none" if routes is None else f"{routes.experts}", "some" if wanted else "none"
    if routes is None or not isinstance(feed_forward, Experts):
        return
    if routes.experts != feed_forward.experts:
        yield f"{where}.experts", "experts", routes.experts, feed_forward.experts
    got, places = routes.experts_TA.shape[1], feed_forward.router.places(feed_forward.experts)
    if got != places:
        yield f"{where}.router.top_k", "top_k", got, places


def _reads_otherwise(index: int, layer: Layer, trace: Trace) -> Iterator[tuple[str, str, object, object]]:
    where, read, attention = f"layers[{index}].attention", trace.reads.get(index), layer.attention
    if read is None:  # not every mode of a selecting layer reads by its choice; the layer refuses when it does
        return
    if not isinstance(attention, SelectingPattern):
        yield where, f"{attention.kind} reads no chosen blocks", "blocks", "none"
    elif attention.block != read.block:
        yield f"{where}.block", "block", read.block, attention.block
