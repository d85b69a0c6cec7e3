"""Every rule between parts is refused with its path, its reason and its remedy."""

import pytest
from cases import model_spec

from sextant.axes.attention import Full, MoBA, Window
from sextant.axes.capacity import Dense
from sextant.axes.kv import GQA, ALiBi
from sextant.axes.stability import SandwichNorm
from sextant.core.errors import UsageError
from sextant.model.checks import RULES, check
from sextant.model.spec import Layer

GOOD = Layer(kv=GQA(heads=4, kv_heads=2, head_dim=8), feed_forward=Dense(hidden=8))
BROKEN = {
    "sinks_need_order": (
        GOOD.replace(attention=Window(window=4, sinks=2), kv=GOOD.kv.replace(position=ALiBi())),
        ["model.layers[1].attention.sinks", "ALiBi fades attention sinks", "Use rope or nope, or set sinks to 0"],
    ),
    "window_within_context": (
        GOOD.replace(attention=Window(window=4097)),
        ["model.layers[1].attention.window", "window 4097 exceeds the context 4096", "Use kind: full"],
    ),
    "pattern_meets_kv": (
        GOOD.replace(attention=MoBA(block=4097, top_k=2)),
        ["model.layers[1].attention.block", "block 4097 exceeds the context 4096", "Use a smaller block"],
    ),
    "zero_gain_keeps_a_path": (
        GOOD.replace(residual=SandwichNorm(attention_gain=-0.5)),
        ["model.layers[1].residual.attention_gain", "negative", "Use 0 (off at start) or 1"],
    ),
}


def test_every_rule_has_a_case():
    assert set(BROKEN) == {getattr(rule, "__name__", "") for rule in RULES}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_broken_rule_is_refused_by_name(rule):
    layer, words = BROKEN[rule.__name__]
    spec = model_spec(GOOD, layer)
    with pytest.raises(UsageError) as caught:
        check(spec)
    line = str(caught.value)
    assert [word for word in words if word not in line] == [], line
    assert list(rule(spec)) and not any(list(other(spec)) for other in RULES if other is not rule)


CLASHES = {
    "a block mean has no distance": (
        GOOD.replace(attention=MoBA(block=4, top_k=2), kv=GOOD.kv.replace(position=ALiBi())),
        ["model.layers[1].kv.position", "moba cannot rank blocks by ALiBi", "Use rope or nope"],
    ),
}
"""More pairs that a pattern refuses, each in its own words."""


@pytest.mark.parametrize("case", CLASHES)
def test_clash_of_pattern_and_kv_is_refused(case):
    layer, words = CLASHES[case]
    with pytest.raises(UsageError) as caught:
        check(model_spec(GOOD, layer))
    assert [word for word in words if word not in str(caught.value)] == []


def test_good_neighbours_pass():
    """Each field on the allowed side of its rule."""
    check(
        model_spec(
            GOOD.replace(attention=Window(window=4096, sinks=2)),
            GOOD.replace(attention=Window(window=4), kv=GOOD.kv.replace(position=ALiBi())),
            GOOD.replace(attention=MoBA(block=4096, top_k=2)),
            GOOD.replace(attention=Full(), residual=SandwichNorm(attention_gain=0.0)),
        )
    )


def test_path_starts_where_the_caller_says():
    with pytest.raises(UsageError, match=r"run\.model\.layers\[0\]\.residual\.attention_gain"):
        check(model_spec(GOOD.replace(residual=SandwichNorm(attention_gain=-1.0))), "run.model")
