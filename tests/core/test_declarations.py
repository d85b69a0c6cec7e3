"""Declarations: what goes in comes out, and what is wrong is named where it is wrong."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sextant import recipes
from sextant.axes.attention import Full, Strided, Window
from sextant.axes.capacity import Dense, Experts
from sextant.axes.kv import GQA, ALiBi, NoPE, RoPE
from sextant.axes.routing import Auxiliary, SoftmaxTopK, ZLoss
from sextant.axes.stability import NormalInit, SandwichNorm
from sextant.core import plain
from sextant.core.errors import UsageError
from sextant.core.plain import parse_value, read_yaml, write_value, write_yaml
from sextant.core.settings import Setting
from sextant.model.spec import Layer, ModelSpec, repeat, stack
from sextant.train.optim import AdamW, Muon
from sextant.train.run import Batch, Run

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

NANO_YAML = recipes.get("nano").twin().to_yaml()


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
        ("layers[0].attention.window=0", ["--set layers[0].attention.window (got 0, expected at least 1)"]),
        ("window=4", ["no such setting: --set window (got window). Did you mean 'layers[*].attention.window'?"]),
        ("experts=8", ["Did you mean 'layers[*].feed_forward.experts'?"]),
        ("layers[0].experts=8", ["Did you mean 'layers[*].feed_forward.experts'?"]),
        ("mtp.depth=2", ["--set mtp.depth (got depth)", "give it as a whole"]),
        ("=3", ["--set needs path=value (got '=3'"]),
        (".=3", ["--set needs path=value (got '.=3'"]),
        ("layers[x].kv=3", ["--set needs path=value"]),
        ("width=&a [*a]", ['--set width (got "&a [*a]", expected a whole number)']),
        (f"width={10**22}", ["--set width", "expected what 64 bits hold"]),
        (f"layers[2].kv.head_dim={2**31}", ["--set layers[2].kv.head_dim (got 2147483648, expected at most"]),
        (f"width={'9' * 400}k", ["--set width", "expected a whole number"]),
        (f"width={'9' * 5000}", ["--set width", "expected a whole number"]),
        ("layers[0].residual.attention_gain=1e300", ["attention_gain (got 1e+300, expected what fp32 holds"]),
        ("embedding_scale=big", ['--set embedding_scale (got "big", expected a number)']),
        ("layers=3", ["--set layers (got 3, expected a list)"]),
        ("layers[0]=3", ["--set layers[0] (got 3, expected a mapping of keys to values)"]),
        ("layers[0].kv={heads: 2}", ["missing key: --set layers[0].kv.kind. Give it a value"]),
        ("layers[0].attention.kind=moba", ["missing key: --set layers[0].attention."]),
        ("layers[0].kv.qk_norm_over=heads", ["expected 'head' or 'all')"]),
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
        (lambda d: d["layers"][0]["attention"].update(window=0), ["layers[0].attention.window (got 0, expected"]),
        (lambda d: d["layers"][3]["feed_forward"].update(experts=0), ["layers[3].feed_forward.experts (got 0, "]),
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


def test_a_path_reaches_into_lists_of_numbers():
    assert AdamW().override("betas[1]=0.5").betas == (0.9, 0.5)
    batch = Batch(rows=8, micro_rows=4, ramp=((5, 4), (9, 8)))
    assert batch.override("ramp[1][0]=7").ramp == batch.override("ramp=[[5, 4], [7, 8]]").ramp == ((5, 4), (7, 8))


def test_a_step_keeps_the_elements_that_have_it():
    changed = SPEC.override("layers[*].feed_forward.balance[*].coef=0.5")
    assert [term.coef for term in changed.layers[3].feed_forward.balance] == [0.5, 0.5]
    assert changed.layers[0] == SPEC.layers[0]


def test_another_kind_keeps_what_both_have_and_takes_its_own_defaults():
    """Only what was given is kept: Muon has its own default rate."""
    run = recipes.get("nano").twin()
    assert run.override("optimiser.kind=muon").optimiser == Muon(lr=run.optimiser.lr)
    assert run.replace(optimiser=AdamW()).override("optimiser.kind=muon").optimiser == Muon()
    moved = SPEC.override("layers[*].kv.position.kind=alibi", "layers[*].attention.kind=full")
    assert {layer.kv.position for layer in moved.layers} == {ALiBi()}
    assert {layer.attention for layer in moved.layers} == {Full()}
    strided = SPEC.override("layers[0].attention.kind=strided", "layers[0].attention.stride=4")
    assert strided.layers[0].attention == Strided(stride=4)


def test_what_nobody_gave_stays_a_default():
    spec = SPEC.override("init.std=0.5").replace(width=32)
    assert spec.init == NormalInit(std=0.5)
    assert "softcap" not in spec.model_fields_set and {"init", "width", "name"} <= spec.model_fields_set


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2001", "2001"), ("1e5", "1e5"), ("null", "null"), ("a: b", "a: b"), ("[x", "[x"), ("a #b", "a #b"),
        ("x ", "x "), ("'it''s'", "it's"), ('"a" or "b"', '"a" or "b"'), ("1.5.2b", "1.5.2b"), ("'", "'"),
        ("2024-01-01", "2024-01-01"),
    ],
)  # fmt: skip
def test_text_is_taken_as_typed(text, value):
    assert SPEC.override(f"name={text}").name == value


def test_text_that_may_be_missing_can_be_taken_back():
    run = recipes.get("nano").twin().override("init_from=12")
    assert run.init_from == "12" and run.override("init_from=null").init_from is None


@given(st.text() | st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.booleans() | st.none())
def test_a_value_on_one_line_comes_back(value):
    line = write_value(value)
    assert len(line.splitlines()) <= 1 and parse_value(line) == value
    if isinstance(value, str):
        assert SPEC.override(f"name={line}").name == value


@given(st.dictionaries(st.text(min_size=1), st.text() | st.floats(allow_nan=False)))
@example({"prompt": "1e5", "name": "1e-4", "source": "-2.e+3", "when": "2024-01-01"})
def test_text_in_a_file_comes_back_as_text(data):
    assert yaml.load(write_yaml(data), Loader=plain._Loader) == data


def test_every_source_is_blamed_for_its_own_setting():
    spec = [Setting("width", "ten", "--width"), Setting.read("vocab=3"), Setting.read("context=4", "env X")]
    with pytest.raises(UsageError, match=r"^wrong value: --width width \(got \"ten\", expected a whole number\)$"):
        SPEC.with_settings(spec)
    both = [Setting.read("layers[0].kv.heads=3"), Setting("layers[0].kv.kv_heads", "2", "--groups")]
    with pytest.raises(UsageError, match=r"kv_heads 2 must divide heads 3: --set and --groups layers\[0\]\.kv$"):
        SPEC.with_settings(both)


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
        ("a: 1\n? [1]\n: 2\n", ["a.yaml:2", "a key must be text"]),
        ("a: 1\n<<: [1]\n", ["a.yaml:2", "<< needs a mapping"]),
        ("1: 2\n", ["a.yaml:1", "a key must be text"]),
        ("a: &x [*x]\n", ["a.yaml:1", "*x contains itself"]),
        ("a: &x {b: {c: *x}}\n", ["a.yaml:1", "*x contains itself"]),
        ("[" * 20_000, ["a.yaml:1", "nested more than 100 deep"]),
        (f"a: {'9' * 5000}\n", ["a.yaml:1", "not a value"]),
        ("a: 1\nb: !!int ''\n", ["a.yaml:2", "not a value"]),
        ("a: !!bool maybe\n", ["a.yaml:1", "not a value"]),
        ("a: *x\n", ["a.yaml:1"]),
        ("a: \x07\n", ["a.yaml"]),
        ("a: !!python/object:os.system x\n", ["a.yaml:1"]),
        ("---\na: 1\n---\nb: 1\n", ["a.yaml:3"]),
    ],
)
def test_bad_yaml_names_its_line(tmp_path: Path, text, words):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    line = refusal(lambda: read_yaml(path))
    assert [word for word in words if word not in line] == [], line


def test_yaml_merge_keys(tmp_path: Path):
    """Also where a mapping is merged on before its own turn to be read."""
    path = tmp_path / "a.yaml"
    path.write_text("y: &y {k: 0, j: 5}\na: {c: &x {<<: *y, k: 1}}\nb: {<<: [*x, *y], j: 2}\n")
    assert read_yaml(path) == {"y": {"k": 0, "j": 5}, "a": {"c": {"k": 1, "j": 5}}, "b": {"k": 1, "j": 2}}


SLIPS = st.sampled_from([*"[]{}:,-&*!?#|>'\"%@ \n\tx0", "<<: ", "1e999", "!!set"])


@given(st.lists(st.tuples(st.integers(0, 10**4), SLIPS)))
@settings(deadline=None)
def test_a_run_file_with_slips_is_taken_or_refused_in_one_line(tmp_path_factory, slips):
    text = NANO_YAML
    for place, slip in slips:
        place %= len(text)
        text = text[:place] + slip + text[place + len(slip) % 2 :]
    path = tmp_path_factory.getbasetemp() / "slips.yaml"
    path.write_text(text)
    try:
        assert Run.load(path)
    except UsageError as error:
        assert "\n" not in str(error)


def test_dates_are_text(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text("a: 9999-99-99\nb: 2024-01-01\n")
    assert read_yaml(path) == {"a": "9999-99-99", "b": "2024-01-01"}


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
