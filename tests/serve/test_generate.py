"""Decoding against the plain forward, streaming against one shot, batches against single prompts, and loading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sextant.axes.numerics import BF16, FP32
from sextant.core.errors import CheckpointError, UsageError
from sextant.core.stream import Stream
from sextant.data.tokenizer import Tokenizer
from sextant.model.spec import ModelSpec
from sextant.model.transformer import Transformer
from sextant.serve.generate import Generator, decode_tokens, load, lower_weights, sampler
from sextant.serve.sampling import Sampling
from sextant.train import checkpoint

GREEDY = Sampling(temperature=0, max_tokens=40, seed=0)
PROMPTS = ["the cat", "", "naïve café 猫と犬 🙂 and the dog ran to the mat", "a", "the dog ran to the cat; the mat"]


def by_forward(model: Transformer, ids: list[int], new: int, vocab: int) -> list[int]:
    """Greedy decoding without any state: the whole sequence again for every token."""
    ids = list(ids)
    for _ in range(new):
        hidden_TD = model(torch.tensor(ids), Stream.of_lengths([len(ids)])).hidden_TD
        ids.append(int(model.logits(hidden_TD[-1:])[0, :vocab].argmax()))
    return ids[-new:]


def test_greedy_decoding_equals_the_plain_forward(model: Transformer, tokenizer: Tokenizer):
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt) or [tokenizer.eot_id]
        result = Generator(model, tokenizer).generate([prompt], GREEDY)[0]
        assert result.tokens == by_forward(model, ids, len(result.tokens), tokenizer.vocab_size)


def test_a_batch_gives_what_single_prompts_give(model: Transformer, tokenizer: Tokenizer):
    generator = Generator(model, tokenizer)
    for sampling in (GREEDY, Sampling(temperature=0.9, top_p=0.9, seed=11, max_tokens=30)):
        together = generator.generate(PROMPTS, sampling)
        alone = [generator.generate([prompt], sampling)[0] for prompt in PROMPTS]
        assert together == alone


def test_answers_that_end_early_leave_the_others_alone(model: Transformer, tokenizer: Tokenizer):
    generator = Generator(model, tokenizer)
    full = generator.generate(PROMPTS, GREEDY)
    stop = full[2].text[3:5]
    stopped = generator.generate(PROMPTS, GREEDY.replace(stop=(stop,)))
    assert {result.finish_reason for result in stopped} >= {"stop"}
    for before, after in zip(full, stopped, strict=True):
        assert after.text == before.text.split(stop)[0]
        assert after.tokens == before.tokens[: len(after.tokens)]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
def test_streaming_gives_the_same_text(model: Transformer, tokenizer: Tokenizer, temperature: float):
    generator = Generator(model, tokenizer)
    sampling = Sampling(temperature=temperature, seed=5, max_tokens=60, stop=("zz", "t"))
    for prompt in PROMPTS:
        assert "".join(generator.stream(prompt, sampling)) == generator.generate([prompt], sampling)[0].text


def test_seeds_repeat_and_choices_differ(model: Transformer, tokenizer: Tokenizer):
    generator, sampling = Generator(model, tokenizer), Sampling(temperature=1.5, seed=3, max_tokens=20)
    four = generator.generate(["the", "a"], sampling, n=4)
    assert four == generator.generate(["the", "a"], sampling, n=4)
    assert len({tuple(result.tokens) for result in four[:4]}) == 4
    assert four[0] == generator.generate(["the"], sampling)[0]
    assert four[4:] == generator.generate(["a"], sampling, n=4)
    other = generator.generate(["the"], sampling.replace(seed=4))[0]
    assert other.tokens != four[0].tokens


def test_without_a_seed_a_fresh_one_is_drawn_and_told(model: Transformer, tokenizer: Tokenizer):
    generator, sampling = Generator(model, tokenizer), Sampling(temperature=1.5, max_tokens=20)
    first, second = (generator.generate(["the"], sampling)[0] for _ in range(2))
    assert first.seed != second.seed and first.tokens != second.tokens
    assert generator.generate(["the"], sampling.replace(seed=first.seed))[0] == first


def test_the_context_ends_an_answer(model: Transformer, tokenizer: Tokenizer):
    generator, context = Generator(model, tokenizer), model.spec.context
    ids = (tokenizer.encode("the cat sat on the mat ") * context)[: context - 3]
    result = generator.generate([ids], Sampling(temperature=0, max_tokens=50))[0]
    assert len(result.tokens) <= 3 and result.finish_reason in ("length", "eot")
    with pytest.raises(UsageError, match=f"{context} tokens.*below {context}"):
        generator.generate([ids + ids[:3]])


def test_ids_outside_the_vocabulary_are_refused_and_never_sampled(tokenizer: Tokenizer, model: Transformer):
    with pytest.raises(UsageError, match="outside the vocabulary"):
        Generator(model, tokenizer).generate([[1, tokenizer.vocab_size]])
    with pytest.raises(UsageError, match="got -1"):
        Generator(model, tokenizer).generate([[-1, 4]])
    wide = wide_model(model.spec)
    with torch.no_grad():
        wide.head_PD[tokenizer.vocab_size :] *= 100
    result = Generator(wide, tokenizer).generate(["the"], Sampling(temperature=2, max_tokens=50, seed=0))[0]
    assert max(result.tokens) < tokenizer.vocab_size


def wide_model(spec: ModelSpec) -> Transformer:
    return spec.replace(vocab=512, tied=False).build(seed=1)


def test_statistics_count_tokens_and_states(model: Transformer, tokenizer: Tokenizer):
    generator = Generator(model, tokenizer)
    results = generator.generate(PROMPTS[:2], Sampling(temperature=0, max_tokens=7))
    stats = generator.stats
    assert stats.new_tokens == sum(len(result.tokens) for result in results)
    assert stats.prompt_tokens == sum(result.prompt_tokens for result in results)
    one = Generator(model, tokenizer)
    ended = one.generate([[7, 8, 9]], Sampling(temperature=0, max_tokens=7))[0]
    held = 3 + len(ended.tokens) - 1  # the last token was never fed
    assert one.stats.state_bytes == sum(state.nbytes(held, 4) for state in model.spec.states())
    assert one.stats.decode_seconds > 0 and one.stats.tokens_per_second > 0
    assert generator.generate([], GREEDY) == []


def test_decode_tokens_is_greedy_decoding(model: Transformer):
    prompts = [[5, 6, 7], [9]]
    expected = [by_forward(model, ids, 20, model.spec.vocab) for ids in prompts]
    assert decode_tokens(model, prompts, 20) == expected


def test_the_sampler_of_training_leaves_the_model_as_it_was(tokenizer: Tokenizer, model: Transformer):
    own = model.spec.build(seed=2).train()
    before, state = torch.get_rng_state(), {name: value.clone() for name, value in own.state_dict().items()}
    first = sampler(own, tokenizer, "the cat", max_tokens=12)
    assert first.startswith("the cat") and first == sampler(own, tokenizer, "the cat", max_tokens=12)
    assert own.training and torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in state.items())
    hidden_TD = own(torch.tensor([3, 4]), Stream.of_lengths([2])).hidden_TD
    hidden_TD.sum().backward()  # nothing of inference mode stays behind
    assert own.embedding.weight.grad is not None


# --- loading --------------------------------------------------------------------------------------------------------


def test_a_run_folder_gives_its_newest_step(run_folder: Path, model: Transformer, tokenizer: Tokenizer):
    loaded, its_tokenizer, run = load(run_folder)
    assert its_tokenizer.digest == tokenizer.digest and run.name == "small"
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert Generator(loaded, its_tokenizer).generate(PROMPTS, GREEDY) == Generator(model, tokenizer).generate(
        PROMPTS, GREEDY
    )


def test_one_step_can_be_named(run_folder: Path, model: Transformer):
    older, _, _ = load(run_folder / "checkpoints" / "step-00000001")
    assert not torch.equal(older.embedding.weight, model.embedding.weight)


def test_a_damaged_newest_step_is_passed_over_and_named(run_folder: Path, tmp_path: Path, model: Transformer):
    folder = tmp_path / "small"
    shutil.copytree(run_folder, folder)
    file = folder / "checkpoints" / "step-00000002" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    said: list[str] = []
    assert not torch.equal(load(folder, say=said.append)[0].embedding.weight, model.embedding.weight)
    assert len(said) == 1 and said[0].startswith("skipped: changed since it was written: step-00000002/model")
    with pytest.raises(CheckpointError, match="changed since it was written"):
        load(folder / "checkpoints" / "step-00000002")
    shutil.rmtree(folder / "checkpoints" / "step-00000001")
    with pytest.raises(CheckpointError, match="changed since it was written"):
        load(folder)


def test_another_tokenizer_is_refused(run_folder: Path, tmp_path: Path):
    folder = tmp_path / "small"
    shutil.copytree(run_folder, folder)
    other = Tokenizer.train(["something else altogether " * 30], 280)
    (folder / "tokenizer.json").write_text(other.to_json(), encoding="utf-8")
    with pytest.raises(CheckpointError, match="not the one that the checkpoint was trained with") as error:
        load(folder)
    assert error.value.exit_code == 4


def test_another_model_and_broken_weights_are_refused(run_folder: Path, tmp_path: Path, tokenizer: Tokenizer):
    folder = tmp_path / "small"
    shutil.copytree(run_folder, folder)
    _, _, run = load(folder)
    identity = {"tokenizer": tokenizer.digest}
    narrow = run.model.replace(width=16).build()
    checkpoint.save(folder / "checkpoints", 3, {"model": narrow.state_dict()}, {}, identity)
    with pytest.raises(CheckpointError, match="do not fit the model"):
        load(folder)
    broken = run.model.build()
    broken.embedding.weight.data[3, 3] = torch.nan
    checkpoint.save(folder / "checkpoints", 4, {"model": broken.state_dict()}, {}, identity)
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        load(folder)


def test_folders_without_checkpoints_and_pickles_are_refused(tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load(tmp_path / "nothing")
    pickled = tmp_path / "model.bin"
    pickled.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(CheckpointError, match="can run code"):
        load(pickled)
    manifest = tmp_path / "step-00000001"
    manifest.mkdir()
    (manifest / "manifest.json").write_text(json.dumps({"step": 1}))
    with pytest.raises(CheckpointError, match="damaged manifest"):
        load(manifest)


@pytest.mark.parametrize("tied", [True, False])
def test_lower_weights_casts_products_only_and_changes_no_logit(model: Transformer, tied: bool):
    spec = model.spec.replace(tied=tied)
    plain, lowered = spec.build(BF16(), seed=4).eval(), lower_weights(spec.build(BF16(), seed=4).eval())
    tokens_T, stream = torch.randint(3, 290, (17,)), Stream.of_lengths([17])
    with torch.no_grad():
        expected, got = (m.logits(m(tokens_T, stream).hidden_TD) for m in (plain, lowered))
    assert torch.equal(expected, got)
    dtypes = {name: parameter.dtype for name, parameter in lowered.named_parameters()}
    assert dtypes["embedding.weight"] == torch.float32 and dtypes["head.weight"] == torch.bfloat16
    assert {dtypes[name] for name in dtypes if "norm" in name or "router" in name} == {torch.float32}
    assert {dtypes[name] for name in dtypes if ".attention.kv." in name} == {torch.bfloat16}


def test_a_run_can_be_loaded_in_bf16(run_folder: Path, tokenizer: Tokenizer):
    model, _, _ = load(run_folder, numerics=BF16())
    assert model.blocks[0].attention.kv.q.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert len(Generator(model, tokenizer).generate(["the"], GREEDY)[0].tokens) > 0
    plain, _, _ = load(run_folder, numerics=FP32())
    assert plain.head is None
