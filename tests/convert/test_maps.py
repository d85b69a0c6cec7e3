"""The weight maps: there and back without losing a bit, and what is said about tensors that do not fit."""

from __future__ import annotations

import pytest
import torch
from oracle_hf import CASES, Pair, make_pair

from sextant.convert import FAMILIES, export_weights, import_weights, spec_from_hf
from sextant.core.errors import CheckpointError, UsageError


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory) -> Pair:
    return make_pair(CASES[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Pair:
    return make_pair(CASES["mixtral"], tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Pair:
    return make_pair(CASES["llama-tied"], tmp_path_factory.mktemp("tied"))


def fresh(pair: Pair):
    return spec_from_hf(pair.config).build(seed=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_import_then_export_returns_every_bit(pair: Pair, dtype: torch.dtype):
    """Under the names that transformers writes; bf16 files survive fp32 masters."""
    disk = {name: tensor.to(dtype) for name, tensor in pair.disk.items()}
    model = fresh(pair)
    import_weights(model, disk, pair.case.family)
    back = export_weights(model, pair.case.family)
    assert back.keys() == disk.keys()
    for name, tensor in disk.items():
        assert back[name].is_contiguous()
        assert torch.equal(back[name].to(dtype), tensor), name


def test_export_then_import_returns_every_bit(pair: Pair):
    model, other = fresh(pair), spec_from_hf(pair.config).build(seed=3)
    import_weights(other, export_weights(model, pair.case.family), pair.case.family)
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_transformers_loads_what_we_export(pair: Pair, tmp_path):
    """Their reader takes our tensors and gives the model back; nothing is reported missing or left over."""
    from safetensors.torch import save_file

    save_file(export_weights(pair.ours, pair.case.family), tmp_path / "model.safetensors", {"format": "pt"})
    pair.theirs.config.save_pretrained(tmp_path)
    loaded, report = type(pair.theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (name, a), (_, b) in zip(loaded.named_parameters(), pair.theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_experts_are_stacked_gate_first(mixtral: Pair):
    """``up_EDF[e]`` is w1 then w3 along F, both transposed; ``down_EFD[e]`` is w2 transposed."""
    experts = mixtral.ours.blocks[1].feed_forward.experts
    at = "model.layers.1.block_sparse_moe.experts.3"
    gate_DF, value_DF = experts.up_EDF[3].chunk(2, dim=1)
    assert torch.equal(gate_DF, mixtral.disk[f"{at}.w1.weight"].t())
    assert torch.equal(value_DF, mixtral.disk[f"{at}.w3.weight"].t())
    assert torch.equal(experts.down_EFD[3], mixtral.disk[f"{at}.w2.weight"].t())


def test_selection_biases_survive_a_bf16_model(tmp_path):
    """They steer choices by less than a bf16 step at the size that trained ones have."""
    pair = make_pair(CASES["deepseek-v3"], tmp_path)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    disk = pair.disk | {name: pair.disk[name] + 5}
    model = fresh(pair).bfloat16()
    import_weights(model, disk, "deepseek_v3")
    assert torch.equal(model.blocks[1].feed_forward.router.bias.value_E, disk[name])
    assert torch.equal(export_weights(model, "deepseek_v3")[name], disk[name])
    with pytest.raises(CheckpointError, match="1 tensors do not fit"):
        import_weights(model, {other: tensor for other, tensor in disk.items() if other != name}, "deepseek_v3")


def test_every_problem_is_counted_and_nothing_is_changed(mixtral: Pair):
    disk = dict(mixtral.disk)
    gone, bent, strange = "model.layers.0.block_sparse_moe.experts.2.w3.weight", "model.norm.weight", "model.extra"
    del disk[gone]
    disk[bent] = torch.randn(7)
    disk[strange] = torch.randn(2, 3)
    model = fresh(mixtral)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(CheckpointError) as error:
        import_weights(model, disk, "mixtral")
    line = error.value.line()
    assert "3 tensors do not fit" in line
    assert f"{gone} got nothing, expected [56, 48]" in line
    assert f"{bent} got [7], expected [48]" in line
    assert f"{strange} got [2, 3], expected nothing" in line
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_five_problems_are_named(mixtral: Pair):
    with pytest.raises(CheckpointError, match=f"{len(mixtral.disk)} tensors do not fit") as error:
        import_weights(fresh(mixtral), {}, "mixtral")
    assert error.value.where.count("got nothing") == 5


def test_whole_numbers_are_not_weights(tied: Pair):
    disk = {**tied.disk, "model.norm.weight": torch.randint(-9, 9, (48,), dtype=torch.int8)}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight got torch\.int8, expected a floating dtype"):
        import_weights(fresh(tied), disk, "llama")


def test_tied_files_may_repeat_the_embedding(tied: Pair):
    embedding = tied.disk["model.embed_tokens.weight"]
    import_weights(fresh(tied), {**tied.disk, "lm_head.weight": embedding.clone()}, "llama")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight got .* expected nothing"):
        import_weights(fresh(tied), {**tied.disk, "lm_head.weight": embedding + 1}, "llama")


def test_old_frequency_buffers_are_passed_over(tied: Pair):
    model, name = fresh(tied), "model.layers.0.self_attn.rotary_emb.inv_freq"
    import_weights(model, {**tied.disk, name: torch.rand(4)}, "llama")
    assert torch.equal(model.embedding.weight, tied.disk["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    "family, message",
    [
        ("lama", "Did you mean 'llama'?"),
        ("mixtral", "the mixtral family has no such parameter: blocks.0.feed_forward.gate.weight"),
    ],
)
def test_wrong_family(tied: Pair, family: str, message: str):
    with pytest.raises(UsageError) as error:
        export_weights(tied.ours, family)
    assert message in error.value.line()


def test_a_model_without_memory_is_refused(tied: Pair):
    with pytest.raises(UsageError, match="without memory"):
        import_weights(spec_from_hf(tied.config).build(device="meta"), tied.disk, "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_names_occur_once(family: str):
    """A name on either side belongs to one row."""
    rows = FAMILIES[family]
    ours = [name for row in rows for name in row.our_names]
    theirs = [name for row in rows for name in row.their_names]
    assert len(set(ours)) == len(ours)
    assert len(set(theirs)) == len(theirs)
