"""Rules between parts, each refused by name with the reason; rules inside one part live with that part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import wraps

from sextant.axes.attention import Pattern, Window
from sextant.axes.capacity import Experts
from sextant.axes.kv import GQA, ALiBi
from sextant.axes.stability import MuPInit, SandwichNorm
from sextant.core.cost import At
from sextant.core.errors import UsageError
from sextant.model.spec import Layer, ModelSpec

MOST_PARAMETERS = 10**15
Problem = tuple[str, str, str]
"""Path of the field, what is wrong, what to do."""


def check(model: ModelSpec, path: str = "model") -> None:
    """Raise the first broken rule.

    Raises:
        UsageError: with the path of the field, the reason and the remedy.
    """
    for rule in RULES:
        for where, what, fix in rule(model):
            raise UsageError(what, where=f"{path}.{where}", fix=fix)
    _countable(model, path)


def _countable(model: ModelSpec, path: str) -> None:
    """Sizes that are fine by themselves may multiply to more than a tensor can index. Only what no rule refuses has a
    cost, so this is no rule.
    """
    params = model.training_cost(At(1)).params
    if params > MOST_PARAMETERS:
        facts = {"got": f"{params:.1e}", "expected": f"at most {MOST_PARAMETERS:.0e}"}
        raise UsageError("too many parameters", where=path, fix="Lower widths, counts or the vocabulary", **facts)


def notes(model: ModelSpec) -> list[str]:
    """What works and may surprise, a line each."""
    routers = {index: layer.feed_forward.router for index, layer in enumerate(model.layers)
               if isinstance(layer.feed_forward, Experts) and not layer.feed_forward.router.causal}
    if not routers:
        return []
    kinds, places = sorted({router.kind for router in routers.values()}), ", ".join(map(str, routers))
    return [f"{' and '.join(kinds)} (layers {places}) looks at all tokens of a call, later ones too: what is generated "
            "token by token is another function than what was trained"]


def _each_layer(rule: Callable[[Layer, ModelSpec], Iterator[Problem]]) -> Callable[[ModelSpec], Iterator[Problem]]:
    @wraps(rule)
    def over_layers(model: ModelSpec) -> Iterator[Problem]:
        for index, layer in enumerate(model.layers):
            for where, what, fix in rule(layer, model):
                yield f"layers[{index}].{where}", what, fix
        if model.mtp is not None and model.mtp.layer is not None:
            for where, what, fix in rule(model.mtp.layer, model):
                yield f"mtp.layer.{where}", what, fix

    return over_layers


@_each_layer
def sinks_need_order(layer: Layer, model: ModelSpec) -> Iterator[Problem]:
    """ALiBi's penalty grows with the distance, so a sink goes dark and the declared span is not the real one."""
    fades = isinstance(getattr(layer.kv, "position", None), ALiBi)
    if fades and isinstance(layer.attention, Window) and layer.attention.sinks:
        yield "attention.sinks", "ALiBi fades attention sinks with distance", "Use rope or nope, or set sinks to 0"


@_each_layer
def window_within_context(layer: Layer, model: ModelSpec) -> Iterator[Problem]:
    """A window and sinks beyond the context are full attention in disguise and would be budgeted as local."""
    if not isinstance(layer.attention, Window):
        return
    window, sinks = layer.attention.window, layer.attention.sinks
    if window + sinks > model.context:
        kept = f"window {window}" + (f" and {sinks} sinks exceed" if sinks else " exceeds")
        fix = "Use kind: full, a smaller window or a longer context"
        yield "attention.window", f"{kept} the context {model.context}", fix


@_each_layer
def zero_gain_keeps_a_path(layer: Layer, model: ModelSpec) -> Iterator[Problem]:
    """A negative start would begin by subtracting attention; the gain is a start, not a trick."""
    if isinstance(layer.residual, SandwichNorm) and layer.residual.attention_gain < 0:
        yield "residual.attention_gain", "the starting gain is negative", "Use 0 (off at start) or 1"


@_each_layer
def pattern_meets_kv(layer: Layer, model: ModelSpec) -> Iterator[Problem]:
    """What a pattern says it cannot do with this KV option or in this context; the reasons stand in its own file."""
    if isinstance(layer.attention, Pattern):
        yield from layer.attention.clashes(layer.projections, model.context)


@_each_layer
def balance_meets_router(layer: Layer, model: ModelSpec) -> Iterator[Problem]:
    """What a balance term says it cannot do with this router; the reasons stand in its own file."""
    if isinstance(layer.feed_forward, Experts):
        for place, term in enumerate(layer.feed_forward.balance):
            for what, fix in term.clashes(layer.feed_forward.router, layer.feed_forward.experts):
                yield f"feed_forward.balance[{place}]", what, fix


@_each_layer
def mup_scales_scores(layer: Layer, model: ModelSpec) -> Iterator[Problem]:
    """Wider heads under muP: a score sums K products that training aligns, so it is divided by K, not by its root."""
    if not isinstance(model.init, MuPInit) or model.init.base_head_dim is None or layer.kv is None:
        return
    k_dim = layer.kv.shape[2]
    scale, wanted = getattr(layer.kv, "scale", None) or k_dim**-0.5, model.init.score_scale(k_dim)
    if not math.isclose(scale, wanted, rel_tol=1e-3):
        fix = f"Set kv.scale={wanted:.4g}" if isinstance(layer.kv, GQA) else "Keep the width of heads and leave it out"
        yield "kv.scale", f"init.base_head_dim asks for scores times {wanted:.4g}, not {scale:.4g}", fix


RULES: tuple[Callable[[ModelSpec], Iterator[Problem]], ...] = (
    sinks_need_order,
    window_within_context,
    zero_gain_keeps_a_path,
    pattern_meets_kv,
    balance_meets_router,
    mup_scales_scores,
)
