"""Schedules as text: what they expand to, how they reach a model, and errors that point into the text."""

import pytest
from cases import DENSE, PLAIN, model_spec

from sextant.axes.attention import BigBird, BlockLocal, Full, LearnedSink, MoA, MoBA, Window
from sextant.core.errors import UsageError
from sextant.core.spec import Spec
from sextant.model.schedule import parse_schedule
from sextant.model.spec import Layer, ModelSpec, repeat

LAYER = Layer(kv=PLAIN, feed_forward=DENSE)
MOBA = MoBA(block=512, top_k=3)


@pytest.mark.parametrize(
    "text, layers",
    [
        ("full", [Full()]),
        ("(5*window512+1*full)*10", repeat(5 * [Window(window=512)] + [Full()], 60)),
        ("29*moba(block=512,top_k=3),3*full", 29 * [MOBA] + 3 * [Full()]),
        ("2 * ( window4k , full ) * 3", 6 * [Window(window=4000), Full()]),
        ("window_8(sinks=2)", [Window(window=8, sinks=2)]),
        ("block_local64+bigbird16(random=1, seed=4)", [BlockLocal(block=64), BigBird(block=16, random=1, seed=4)]),
        ("learned_sink128,learned_sink", [LearnedSink(window=128), LearnedSink()]),
        ("moa(alpha=[4, 8], beta=[0.0, 0.5])", [MoA(alpha=(4, 8), beta=(0.0, 0.5))]),
        ("((window1+full)*2+window2)", [Window(window=1), Full(), Window(window=1), Full(), Window(window=2)]),
    ],
)
def test_what_a_schedule_says(text, layers):
    assert parse_schedule(text) == layers


def test_names_of_the_caller_come_first():
    names = {"moba": MOBA, "full": Window(window=3)}
    assert parse_schedule("2*moba,full", names) == [MOBA, MOBA, Window(window=3)]


@pytest.mark.parametrize(
    "text, words",
    [
        ("(5*windwo512+1*full)*10", ["schedule at 4", "'windwo512+1*full'", "Did you mean 'window'?"]),
        ("(5*window512+1*full", ["schedule at 20", "bracket", "the end", "')'"]),
        ("3*full)", ["schedule at 7", "')'"]),
        ("full,,full", ["schedule at 6", "',full'"]),
        ("", ["schedule at 1", "the end"]),
        ("full+", ["schedule at 6", "the end"]),
        ("2*full window3", ["schedule at 8", "'window3'"]),
        ("full+0*full", ["a schedule of 0 layers"]),
        ("9999*(full,full)", ["a schedule of 19,998 layers", "1 to 10,000"]),
        ("99999999999*full*99999999999", ["99,999,999,999 layers"]),
        ("full,window0", ["schedule at 6: window", "expected at least 1"]),
        ("full+moba4", ["schedule at 6: top_k", "missing key"]),
        ("window8(sink=2)", ["schedule at 1: sink", "unknown key", "Did you mean 'sinks'?"]),
        ("full7", ["schedule at 1", "full takes no number"]),
    ],
)
def test_errors_point_into_the_text(text, words):
    with pytest.raises(UsageError) as caught:
        parse_schedule(text)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_a_schedule_reaches_the_layers_of_a_model():
    """From ``--set``, from YAML and from Python; what is written afterwards has no schedule left."""
    plain = model_spec(*[LAYER] * 4)
    want = [Window(window=3), Window(window=3), Full(), Full()]
    for model in (
        plain.override("schedule=2*window3+2*full"),
        ModelSpec.parse({**plain.to_dict(), "schedule": "2*window3+2*full"}),
        plain.replace(schedule="2*window3+2*full"),
    ):
        assert [layer.attention for layer in model.layers] == want
        assert model.schedule is None and all(layer.kv == PLAIN for layer in model.layers)
        assert ModelSpec.parse(model.to_dict()) == model


def test_a_schedule_must_fit_the_model():
    with pytest.raises(UsageError, match=r"does not fit the model: --set schedule \(got 3 layers, expected 2\)"):
        model_spec(LAYER, LAYER).override("schedule=3*full")
    with pytest.raises(UsageError, match="schedule at 3"):
        model_spec(LAYER, LAYER).override("schedule=2*fulll")


def test_every_kind_has_a_name_in_schedules():
    """Settings in brackets reach every field: the examples of axis 1 that have plain ones."""
    for example in (MOBA, BigBird(block=3, window=1, global_blocks=0, random=2, seed=9), Window(window=3, sinks=1)):
        assert isinstance(example, Spec)
        settings = ",".join(f"{key}={value}" for key, value in example.to_dict().items() if key != "kind")
        settings = settings.replace("None", "null").replace("True", "true").replace("False", "false")
        assert parse_schedule(f"{example.kind}({settings})") == [example]
