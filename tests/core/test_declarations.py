"""Declarations: what goes in comes out, and what is wrong is named where it is wrong."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sextant.axes.attention import Full, Window
from sextant.axes.capacity import Dense, Experts
from sextant.axes.kv import GQA, NoPE, RoPE
from sextant.axes.routing import Auxiliary, SoftmaxTopK, ZLoss
from sextant.axes.stability import SandwichNorm
from sextant.core.errors import UsageError
from sextant.core.spec import assign, parse_value, read_yaml
from sextant.model.spec import Layer, ModelSpec, repeat, stack

LOCAL = Layer(
    attention=Window(window=8),
    kv=GQA(heads=4, kv_heads=2, head_dim=8),
    feed_forward=Dense(hidden=16),
    residual=SandwichNorm(attention_gain=0.0),
)
GLOBAL = Layer(
    attention=Full(),
    kv=GQA(heads=4, kv_heads=2, head_dim=8, position=NoPE()),
    feed_forward=Experts(experts=4, hidden=8, balance=(Auxiliary(scope="global_batch"), ZLoss())),
)
SPEC = ModelSpec(name="small", vocab=64, width=16, context=128, layers=tuple(repeat(3 * [LOCAL] + [GLOBAL], 8)))


def balance(data: dict) -> list[dict]:
    """The balance losses of the first mixture, in plain data."""
    return data["layers"][3]["feed_forward"]["balance"]


def refusal(call) -> str:
    with pytest.raises(UsageError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_yaml_and_json_round_trip(tmp_path: Path):
    SPEC.save(tmp_path / "model.yaml")
    (tmp_path / "model.json").write_text(json.dumps(SPEC.to_dict()))
    assert ModelSpec.load(tmp_path / "model.yaml") == SPEC == ModelSpec.load(tmp_path / "model.json")


def test_equal_layers_are_written_once():
    text = SPEC.to_yaml()
    assert len(text.splitlines()) < 150
    assert text.count("window: 8") == 1


@given(st.integers(1, 10**6), st.floats(1e-9, 1e9), st.none() | st.floats(1e-3, 1e3), st.booleans())
def test_any_values_round_trip(width, scale, cap, tied):
    """Every float comes back to the bit, also through an override's text."""
    spec = SPEC.replace(width=width, embedding_scale=scale, softcap=cap, tied=tied)
    texts = [f"{path}={json.dumps(value)}" for path, value in spec.leaves().items() if not isinstance(value, list)]
    assert SPEC.override(*texts) == spec


@given(st.dictionaries(st.sampled_from(["width", "vocab", "context"]), st.integers(2, 10**9), min_size=1))
def test_overrides_equal_replacements(changes):
    assert SPEC.override(*(f"{key}={value}" for key, value in changes.items())) == SPEC.replace(**changes)


@given(st.text(max_size=30))
def test_any_text_as_a_value_is_taken_or_refused_in_one_line(text):
    try:
        assert SPEC.override(f"width={text}").width >= 1
    except UsageError as error:
        assert "\n" not in str(error) or "\n" in text


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("layers[3].attention.windw=4", ["layers[3].attention.windw"]),
        ("layers[0].attention.windw=4", ["layers[0].attention.windw", "Did you mean 'window'?"]),
        ("layers[99].attention.window=4", ["layers[99].attention.window", "[0] to [7]"]),
        ("layrs[0].attention.window=4", ["Did you mean 'layers'?"]),
        ("layers[*].attention.nothing=4", ["layers[*].attention.nothing"]),
        ("width", ["--set needs path=value"]),
        ("width=wide", ["width", '"wide"']),
        ("width=1.5", ["width", "1.5"]),
        ("tied=1", ["tied"]),
        ("layers[0].attention.kind=windw", ["layers[0].attention.kind", "windw", "Did you mean 'window'?"]),
        ("layers[0].attention.window=0", ["layers[0].attention.window", "greater than or equal to 1"]),
        ("layers[0].kv.position.base=.nan", ["layers[0].kv.position.base"]),
        ("layers[1].feed_forward.activation=swish", ["layers[1].feed_forward.activation"]),
        ("layers[3].feed_forward.router.top_k=9", ["layers[3].feed_forward", "router.top_k 9 exceeds experts 4"]),
        ("schema_version=2", ["schema_version"]),
    ],
)
def test_a_bad_override_names_its_place(assignment, words):
    line = refusal(lambda: SPEC.override(assignment))
    assert [word for word in words if word not in line] == [], line


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda d: d["layers"][3]["attention"].update(windw=4), ["unknown key: layers[3].attention.windw"]),
        (lambda d: d["layers"][0]["attention"].update(windw=4), ["layers[0].attention.windw. Did you mean 'window'?"]),
        (lambda d: d["layers"][0]["attention"].update(window=0), ["layers[0].attention.window (got 0)"]),
        (lambda d: d["layers"][3]["feed_forward"].update(experts=0), ["layers[3].feed_forward.experts (got 0)"]),
        (lambda d: d["layers"][2].pop("kv"), ["layers[2]", "window needs kv"]),
        (lambda d: d["layers"][0]["attention"].update(kind="sliding"), ["layers[0].attention.kind (got sliding). Did"]),
        (lambda d: balance(d)[1].update(kind="zz"), ["layers[3].feed_forward.balance[1].kind"]),
        (lambda d: balance(d)[0].update(scope="world"), ["layers[3].feed_forward.balance[0].scope"]),
        (lambda d: d.update(width="16"), ["width", '"16"']),
        (lambda d: d.update(layers=[]), ["layers"]),
        (lambda d: d.update(wdth=3), ["unknown key: wdth", "Did you mean 'width'?"]),
        (lambda d: d["layers"].__setitem__(1, 7), ["layers[1]"]),
    ],
)
def test_bad_data_names_its_place(edit, words):
    data = json.loads(json.dumps(SPEC.to_dict()))
    edit(data)
    line = refusal(lambda: ModelSpec.parse(data))
    assert [word for word in words if word not in line] == [], line


def test_every_layer_at_once_reaches_those_that_have_the_field():
    changed = SPEC.override("layers[*].attention.window=5", "layers[*].kv.head_dim=4")
    assert [getattr(layer.attention, "window", None) for layer in changed.layers] == [5, 5, 5, None] * 2
    assert {layer.kv.head_dim for layer in changed.layers} == {4}


def test_negative_index_counts_from_the_end():
    changed = SPEC.override("layers[-1].kv.head_dim=6")
    assert [layer.kv.head_dim for layer in changed.layers] == [8] * 7 + [6]


def test_assign_in_plain_lists():
    data = {"a": [[1, 2], [3, 4]]}
    assign(data, "a[1][0]", 9)
    assert data == {"a": [[1, 2], [9, 4]]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("32k", 32_000), ("32K", 32_768), ("32Ki", 32_768), ("1.5k", 1500), ("8Mi", 2**23), ("1e-4", 1e-4),
        ("2E3", 2000.0), ("3", 3), ("0.5", 0.5), ("true", True), ("null", None), ("[1, 2]", [1, 2]),
        ("{kind: full}", {"kind": "full"}), ("word", "word"), ("a: b: c", "a: b: c"), ("10_000", 10_000),
    ],
)  # fmt: skip
def test_values_as_people_write_them(text, value):
    got = parse_value(text)
    assert got == value and type(got) is type(value)


def test_yaml_numbers_with_exponents(tmp_path: Path):
    """YAML 1.1 reads 1e-4 as text; here it is the number it looks like."""
    path = tmp_path / "a.yaml"
    path.write_text("a: 1e-4\nb: 5e5\nc: -2E-3\nd: 1e5x\n")
    assert read_yaml(path) == {"a": 1e-4, "b": 5e5, "c": -2e-3, "d": "1e5x"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("width: 1\nvocab: 2\nwidth: 3\n", ["a.yaml:3", "key 'width' is written twice"]),
        ("layers:\n  - {kind: full, kind: window}\n", ["a.yaml:2", "key 'kind' is written twice"]),
        ("a: [1, 2\nb: 3\n", ["not valid YAML", "a.yaml:2"]),
    ],
)
def test_bad_yaml_names_its_line(tmp_path: Path, text, words):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    line = refusal(lambda: read_yaml(path))
    assert [word for word in words if word not in line] == [], line


def test_unreadable_files_are_one_line(tmp_path: Path):
    assert "cannot read" in refusal(lambda: ModelSpec.load(tmp_path / "missing.yaml"))
    assert "cannot read" in refusal(lambda: ModelSpec.load(tmp_path))
    (tmp_path / "b.yaml").write_bytes(b"name: \xff\xfe")
    assert "not UTF-8 text" in refusal(lambda: ModelSpec.load(tmp_path / "b.yaml"))
    (tmp_path / "c.yaml").write_text("")
    assert "c.yaml" in refusal(lambda: ModelSpec.load(tmp_path / "c.yaml"))


def test_replace_validates_again():
    assert "kv_heads 3 must divide heads 4" in refusal(lambda: LOCAL.kv.replace(kv_heads=3))


def test_layers_are_hashable_and_equal_by_value():
    same = Layer.parse(LOCAL.to_dict())
    assert same == LOCAL and hash(same) == hash(LOCAL) and LOCAL != GLOBAL


def test_pattern_helpers():
    assert repeat([1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]
    layers = stack(3, attention=repeat([Window(window=4), Full()], 3), kv=LOCAL.kv, feed_forward=LOCAL.feed_forward)
    assert [layer.attention.kind for layer in layers] == ["window", "full", "window"]
    with pytest.raises(ValueError, match="zip"):
        stack(3, attention=[Full()], kv=LOCAL.kv, feed_forward=LOCAL.feed_forward)


def test_leaves_name_every_scalar():
    leaves = SPEC.leaves()
    assert leaves["width"] == 16
    assert leaves["layers[0].attention.window"] == 8
    assert leaves["layers[3].feed_forward.balance[1].kind"] == "z"


def test_nested_options_are_built_from_plain_data():
    kv = GQA.parse({"heads": 2, "kv_heads": 1, "head_dim": 4, "position": {"kind": "rope", "base": 500.0}})
    assert kv.position == RoPE(base=500.0)
    assert SoftmaxTopK.parse({"top_k": 2}) == SoftmaxTopK(top_k=2)
