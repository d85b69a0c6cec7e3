"""list, show, doctor, generate and chat: what they print, and that their numbers are those of the code."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from sextant import recipes
from sextant.cli.list import tables
from sextant.cli.show import describe, parts, pattern
from sextant.core.cost import At, Cost
from sextant.core.errors import UsageError
from sextant.data.tokenizer import Tokenizer
from sextant.train.run import Run

NAMES = recipes.names()


def test_list_shows_every_row_of_every_table(sextant: Any):
    code, out, _ = sextant("list")
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    rows = [row.name for table in tables().values() for row in table]
    assert all(name in out for name in [*rows, *NAMES, *tables()])


@pytest.mark.parametrize("axis", tables())
def test_list_json_tells_fields_that_build_the_option(sextant: Any, axis: str):
    code, out, _ = sextant("list", axis, "--json")
    rows = json.loads(out)
    assert code == 0 and [row["name"] for row in rows] == [row.name for row in tables()[axis]]
    for found, row in zip(rows, tables()[axis], strict=True):
        required = {name for name, field in found["fields"].items() if "default" not in field}
        assert required == {name for name, field in row.spec.model_fields.items() if field.is_required()}
        assert found["line"] and found["source"]


def test_list_recipes_json_has_the_published_sizes(sextant: Any):
    rows = {row["name"]: row for row in json.loads(sextant("list", "recipes", "--json")[1])}
    assert list(rows) == NAMES
    assert rows["mixtral-8x7b"]["params"] == 46_702_792_704
    assert rows["mixtral-8x7b"]["active_params"] == 12_879_925_248


def test_list_offers_the_nearest_name(sextant: Any):
    code, _, err = sextant("list", "atention")
    assert code == 2 and "Did you mean 'attention'?" in err


@pytest.mark.parametrize("size", ["paper", "twin"])
@pytest.mark.parametrize("name", NAMES)
def test_parts_add_up(name: str, size: str):
    recipe = recipes.get(name)
    model = (recipe.paper() if size == "paper" else recipe.twin()).model
    at = At(model.context)
    total, summed = model.cost(at), sum(parts(model, at).values(), start=Cost())
    assert (summed.params, summed.active_params) == (total.params, total.active_params)
    assert summed.flops == pytest.approx(total.flops, rel=1e-12)
    assert summed.state_bytes == total.state_bytes


def test_parts_are_the_parameters_of_a_built_model():
    model = recipes.get("mai-base-1").twin().model
    built = model.build(device="meta")
    sizes = {name: parameter.numel() for name, parameter in built.named_parameters()}
    found = {name: part.params for name, part in parts(model, At(64)).items()}
    experts = sum(n for name, n in sizes.items() if ".experts." in name)
    attention = sum(n for name, n in sizes.items() if ".attention.kv." in name)
    assert found["experts"] == experts and found["attention"] == attention
    assert found["embedding"] == sizes["embedding.weight"] and found["head"] == 0
    assert sum(found.values()) == sum(sizes.values())


@pytest.mark.parametrize("name", NAMES)
def test_show_fits_80_columns(sextant: Any, name: str):
    code, out, _ = sextant("show", name)
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    assert "embedding and head included" in " ".join(out.split())


def test_show_json_and_its_operating_point(sextant: Any):
    facts = json.loads(sextant("show", "mai-base-1", "--at", "16k", "--json")[1])
    model = recipes.get("mai-base-1").paper().model
    assert facts["at"] == 16_000 and facts["flops_per_token"] == model.cost(At(16_000)).flops
    assert facts["params"] == sum(part["params"] for part in facts["parts"].values())
    assert facts["state_bytes"]["8192"] == sum(state.nbytes(8192, 2) for state in model.states())
    assert facts["columns"]["attention"] == "13 x (5 x window 512, 1 x full)"


def test_show_sums_up_what_changes_from_layer_to_layer(sextant: Any):
    """Seventy lightning layers with seventy decays are one line."""
    attention = json.loads(sextant("show", "minimax-text-01", "--json")[1])["columns"]["attention"]
    assert attention.startswith("10 x (7 x lightning heads 64 head_dim 128 fade 1.00001 to 0.0126682")
    assert attention.endswith("1 x full)")


def test_show_yaml_is_a_run_file_that_show_reads(sextant: Any, tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(sextant("show", "gemma-3-1b", "--size", "twin", "--set", "seed=9", "--yaml")[1], encoding="utf-8")
    run = Run.load(file)
    assert run == recipes.get("gemma-3-1b").twin().replace(seed=9)
    again = json.loads(sextant("show", str(file), "--json")[1])
    assert again == json.loads(json.dumps(describe(run, run.model.context)))


TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": int | float, "null": type(None)}


def problems(data: Any, schema: dict[str, Any], root: dict[str, Any], path: str = "") -> list[str]:
    """Where data break a JSON schema, of the words that pydantic writes."""
    if "$ref" in schema:
        return problems(data, root["$defs"][schema["$ref"].rpartition("/")[2]], root, path)
    if "discriminator" in schema:
        kinds = schema["discriminator"]["mapping"]
        known = isinstance(data, dict) and data.get("kind") in kinds
        return problems(data, {"$ref": kinds[data["kind"]]}, root, path) if known else [f"{path}.kind"]
    if "anyOf" in schema:
        found = [problems(data, option, root, path) for option in schema["anyOf"]]
        return [] if [] in found else max(found, key=lambda lines: len(lines[0]))
    is_type = isinstance(data, bool) if schema["type"] == "boolean" else isinstance(data, TYPES[schema["type"]])
    if not is_type or data not in schema.get("enum", [data]) or data != schema.get("const", data):
        return [path]
    if isinstance(data, dict):
        known = schema["properties"]
        wrong = [f"{path}.{key}" for key in {*schema.get("required", ())} - {*data} | {*data} - {*known}]
        inside = [(data[key], known[key], f"{path}.{key}") for key in data if key in known]
        return wrong + [line for value, of, where in inside for line in problems(value, of, root, where)]
    if isinstance(data, list):
        inner = [*schema.get("prefixItems", ()), *[schema.get("items")] * len(data)]
        if not schema.get("minItems", 0) <= len(data) <= schema.get("maxItems", len(data)):
            return [path]
        return [line for at, item in enumerate(data) for line in problems(item, inner[at], root, f"{path}[{at}]")]
    low, high = schema.get("minimum", data), schema.get("maximum", data)
    return [path] * (isinstance(data, int | float) and not low <= data <= high)


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return Run.model_json_schema()


def test_show_schema_is_the_one_of_run_files(sextant: Any, schema: dict[str, Any]):
    assert json.loads(sextant("show", "--schema")[1]) == schema


@pytest.mark.parametrize("name", NAMES)
def test_schema_accepts_every_recipe(schema: dict[str, Any], name: str):
    for run in (recipes.get(name).paper(), recipes.get(name).twin()):
        assert problems(run.to_dict(), schema, schema) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (".steps", "ten"), (".steps", 0), (".stpes", 3), (".batch.rows", 1.5), (".batch.ramp[0]", [1, 2, 3]),
        (".optimiser.kind", "sgd"), (".model.layers[1].attention.kind", "windw"), (".model.layers[1].kv.heads", 0),
        (".model.layers[1].attention.windw", 4), (".model.layers[1].kv.position.layout", "whole"), (".clip", "much"),
    ],
)  # fmt: skip
def test_schema_refuses_what_a_run_refuses(schema: dict[str, Any], path: str, value: Any):
    data = recipes.get("nano").twin().to_dict() | {"batch": {"rows": 8, "ramp": [[1, 2]]}}
    *steps, last = [int(step) if step.isdigit() else step for step in re.findall(r"\w+", path)]
    place: Any = data
    for step in steps:
        place = place[step]
    place[last] = value
    assert problems(data, schema, schema) == [path]
    with pytest.raises(UsageError):
        Run.parse(data)


def test_show_without_a_recipe_is_misuse(sextant: Any):
    assert sextant("show")[0] == 2


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ("aaaa", "4 x a"), ("aab", "2 x a, 1 x b"), ("aabaab", "2 x (2 x a, 1 x b)"),
        ("aabaabaa", "2 x (2 x a, 1 x b), then 2 x a"), ("a", "1 x a"), ("ab", "1 x a, 1 x b"),
    ],
)
def test_patterns_read_as_repeated_runs(values: str, text: str):
    assert pattern(list(values)) == text


def test_doctor(sextant: Any):
    code, out, err = sextant("doctor")
    assert code == 0 and not err and "torch" in out and "Start: sextant train" in " ".join(out.split())
    facts = json.loads(sextant("doctor", "--json")[1])
    assert facts["cpus"] >= 1 and facts["free_disk"] > 0 and set(facts["extras"]) == {"hf", "plot", "data", "log"}


def test_doctor_names_the_cure_for_a_missing_extra(sextant: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sextant.cli.doctor", fromlist=["EXTRAS"]).EXTRAS, "hf", ("no-such-package", "x"))
    code, out, _ = sextant("doctor")
    assert code == 0 and "pip install 'sextant-lm[hf]'" in " ".join(out.split())


# --- writing --------------------------------------------------------------------------------------------------------


def test_generate_streams_text_and_keeps_numbers_apart(sextant: Any, trained: Path):
    arguments = ("generate", str(trained), "--prompt", "The ", "--seed", "4", "--max-tokens", "12", "--device", "cpu")
    code, out, err = sextant(*arguments)
    assert code == 0 and " tok/s | state " in err and " 12 new " in err
    code, again, _ = sextant(*arguments, "--json")
    result = json.loads(again)
    assert out == result["text"] + "\n" and result["seed"] == 4 and result["new_tokens"] <= 12
    assert sextant(*arguments, "--quiet")[2] == ""


def test_generate_several_and_from_a_file(sextant: Any, trained: Path, tmp_path: Path):
    file = tmp_path / "prompt.txt"
    file.write_text("naïve", encoding="utf-8")
    base = ("generate", str(trained), "--prompt-file", str(file), "--max-tokens", "5", "--seed", "0", "--n", "3")
    code, out, _ = sextant(*base, "--json")
    results = [json.loads(line) for line in out.splitlines()]
    tokenizer = Tokenizer.load(trained)
    assert code == 0 and len(results) == 3
    assert {result["prompt_tokens"] for result in results} == {len(tokenizer.encode("naïve"))}
    assert sextant(*base)[1].count("--- ") == 3


def test_generate_refuses_two_prompts_bad_files_and_ranges(sextant: Any, trained: Path, tmp_path: Path):
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    path = str(trained)
    assert sextant("generate", path)[0] == 2
    assert sextant("generate", path, "--prompt", "x", "--prompt-file", str(binary))[0] == 2
    assert sextant("generate", path, "--prompt-file", str(binary))[0] == 3
    assert sextant("generate", path, "--prompt", "x", "--top-p", "0")[0] == 2
    assert sextant("generate", path, "--prompt", "x", "--stop", "")[0] == 2
    assert sextant("generate", path, "--prompt", "x", "--dtype", "fp17")[0] == 2
    assert sextant("generate", path, "--prompt", "x" * 4000)[0] == 2


class Lines(io.StringIO):
    """Typed lines; a line ``^C`` is an interrupt at the prompt."""

    def readline(self, *_: Any) -> str:
        line = super().readline()
        if line == "^C\n":
            raise KeyboardInterrupt
        return line


@pytest.mark.parametrize("device", ["meta", "mps", "gpu", "cpu:0", "cuda:x"])
@pytest.mark.parametrize("verb", [("train", "nano"), ("generate", "nowhere", "--prompt", "x")], ids=["train", "answer"])
def test_devices_are_read_alike_by_every_verb(sextant: Any, verb: tuple[str, ...], device: str):
    line = f"error: no such device: --device (got {device}, expected cpu, cuda, cuda:N or auto)\n"
    assert sextant(*verb, "--device", device) == (2, "", line)


def test_a_gpu_that_is_not_here_is_a_fault_of_the_machine(sextant: Any):
    line = "error: no CUDA device here: --device (got cuda:300). Use --device cpu\n"
    assert sextant("generate", "nowhere", "--prompt", "x", "--device", "cuda:300") == (6, "", line)


def test_chat_answers_and_obeys(sextant: Any, trained: Path, monkeypatch: pytest.MonkeyPatch):
    typed = "The \n^C\n/stats\n/params temperature=0\n/params top_p=7\n/reset\nAgain\n/what\n/quit\nnever read\n"
    monkeypatch.setattr("sys.stdin", Lines(typed))
    code, out, err = sextant("chat", str(trained), "--max-tokens", "4", "--seed", "1", "--device", "cpu")
    assert code == 0 and out.count("\n") >= 2
    assert "continues the text" in err and "4 new" in err and "temperature=0.0" in err and "[empty]" in err
    assert "error: " in err and "top_p" in err and err.count("/stats numbers") == 2


def test_chat_keeps_turns_apart_and_draws_anew_for_each(trained: Path, monkeypatch: pytest.MonkeyPatch):
    """A line begins on a line of its own, and one seed does not give every turn the same numbers."""
    from sextant.cli.chat import Conversation
    from sextant.serve.generate import Generator, load
    from sextant.serve.sampling import Sampling

    talk = Conversation(Generator(*load(trained)[:2]), Sampling(seed=1, max_tokens=8, temperature=2.0))
    asked: list[str] = []
    whole = talk.generator.stream
    monkeypatch.setattr(talk.generator, "stream", lambda text, *rest: asked.append(text) or whole("same", *rest))
    talk._answer("To be")
    first = talk.text.removeprefix("To be")
    talk._answer("To be")
    assert asked[1] == f"To be{first}\nTo be" if not first.endswith("\n") else asked[1].endswith("\nTo be")
    assert talk.text.removeprefix(asked[1]) != first


def test_chat_keeps_the_text_within_the_context(sextant: Any, trained: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("word and more " * 200 + "\nand on\n"))
    code, _, err = sextant("chat", str(trained), "--max-tokens", "4", "--device", "cpu")
    assert code == 0 and "oldest text is forgotten" in err


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(
    sextant: Any, trained: Path, monkeypatch: pytest.MonkeyPatch
):
    from sextant.serve.generate import Generator

    whole = Generator.stream

    def interrupted(self: Any, *arguments: Any) -> Any:
        yield next(whole(self, *arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "stream", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("The \n/stats\n"))
    code, _, err = sextant("chat", str(trained), "--temperature", "0", "--device", "cpu")
    assert code == 0 and "[stopped]" in err and "prompt tokens" in err


def test_a_model_whose_choices_look_ahead_says_so_in_training_and_in_use(sextant: Any, tmp_path: Path):
    folder = tmp_path / "choosing"
    experts = '{"kind": "experts", "experts": 4, "hidden": 8, "router": {"kind": "expert_choice", "top_k": 1}}'
    settings = ["steps=1", "schedule.warmup=0", "eval_tokens=256", "data.seq_len=32", "sample_every=9",
                f"model.layers[0].feed_forward={experts}"]
    arguments = [word for setting in settings for word in ("--set", setting)]
    code, _, err = sextant("train", "nano", "-o", str(folder), "--device", "cpu", *arguments)
    assert code == 0 and "note: expert_choice (layers 0) looks at all tokens" in " ".join(err.split())
    code, _, err = sextant("generate", str(folder), "--prompt", "a", "--max-tokens", "2", "--device", "cpu")
    assert code == 0 and "note: expert_choice (layers 0) looks at all tokens" in " ".join(err.split())
