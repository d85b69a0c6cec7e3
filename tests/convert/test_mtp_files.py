"""Prediction modules on disk: names past the last layer, copies, files with and without them; and MTP-6: the order of
the row that enters shows in how many drafts are right.
"""

import pytest
import torch
from torch import Tensor

from sextant.axes.capacity import Dense
from sextant.axes.kv import MLA
from sextant.convert import export_weights, import_weights, spec_from_hf
from sextant.core.errors import CheckpointError, UsageError
from sextant.core.stream import Stream
from sextant.model.mtp import MTP
from sextant.model.spec import Layer, ModelSpec
from sextant.serve.speculative import speculate
from sextant.train.balance import Balance
from sextant.train.loss import micro_loss
from sextant.train.optim import AdamW

CONFIG = {
    "model_type": "deepseek_v3", "vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 12,
    "moe_intermediate_size": 6, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "num_attention_heads": 2, "kv_lora_rank": 5, "q_lora_rank": 6,
    "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4, "max_position_embeddings": 64,
    "num_nextn_predict_layers": 2, "routed_scaling_factor": 2.5,
}


def released() -> dict[str, Tensor]:
    """A file as DeepSeek releases them: modules under the layers past the last, with copies of embedding and head."""
    disk = export_weights(spec_from_hf(CONFIG, mtp=True).build(seed=1), "deepseek_v3")
    for layer in (2, 3):
        disk[f"model.layers.{layer}.embed_tokens.weight"] = disk["model.embed_tokens.weight"].clone()
        disk[f"model.layers.{layer}.shared_head.head.weight"] = disk["lm_head.weight"].clone()
    return disk


def test_names_are_those_of_the_release():
    """Spec deepseek-v3, 14.3: a module has all names of an expert layer, and its own four."""
    disk = export_weights(spec_from_hf(CONFIG, mtp=True).build(seed=1), "deepseek_v3")
    last, module = ({n.split(".", 3)[3] for n in disk if n.startswith(f"model.layers.{i}.")} for i in (1, 2))
    assert module - last == {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
    assert last < module and not [name for name in disk if name.startswith("model.layers.4.")]
    assert disk["model.layers.2.eh_proj.weight"].shape == (16, 32)
    assert "model.layers.3.mlp.gate.e_score_correction_bias" in disk


def test_a_released_file_fills_the_modules_and_comes_back():
    disk, model = released(), spec_from_hf(CONFIG, mtp=True).build(seed=2)
    assert model.spec.mtp == MTP(depth=2)
    import_weights(model, disk, "deepseek_v3")
    assert torch.equal(model.mtp[1].project.weight, disk["model.layers.3.eh_proj.weight"])
    back = export_weights(model, "deepseek_v3")
    assert all(torch.equal(tensor, disk[name]) for name, tensor in back.items())
    assert {n for n in disk if n not in back} == {
        f"model.layers.{i}.{name}.weight" for i in (2, 3) for name in ("embed_tokens", "shared_head.head")
    }


def test_a_model_without_modules_reads_the_same_file():
    """Trap 14: the layers past the last are no layers."""
    disk, model = released(), spec_from_hf(CONFIG).build(seed=2)
    assert model.spec.mtp is None
    import_weights(model, disk, "deepseek_v3")
    assert torch.equal(model.norm.gain, disk["model.norm.weight"])


def test_what_is_no_copy_is_refused():
    disk, model = released(), spec_from_hf(CONFIG, mtp=True).build(seed=2)
    disk["model.layers.2.shared_head.head.weight"] += 1
    with pytest.raises(CheckpointError, match=r"layers\.2\.shared_head\.head"):
        import_weights(model, disk, "deepseek_v3")


def test_files_without_modules_are_refused_for_a_model_with_them():
    disk = export_weights(spec_from_hf(CONFIG).build(seed=1), "deepseek_v3")
    with pytest.raises(CheckpointError, match=r"layers\.2\."):
        import_weights(spec_from_hf(CONFIG, mtp=True).build(seed=2), disk, "deepseek_v3")
    with pytest.raises(UsageError, match="num_nextn_predict_layers"):
        spec_from_hf(CONFIG | {"num_nextn_predict_layers": 0}, mtp=True)


# --- MTP-6 -----------------------------------------------------------------------------------------------------------

VOCAB, LENGTH = 12, 24


def text(rows: int, generator: torch.Generator) -> Tensor:
    """``[rows, LENGTH + 1]``: each token follows from the two before it."""
    first = torch.randint(VOCAB, (rows, 2), generator=generator)
    tokens = [first[:, 0], first[:, 1]]
    while len(tokens) <= LENGTH:
        tokens.append((tokens[-1] + 3 * tokens[-2] + 1) % VOCAB)
    return torch.stack(tokens, dim=1)


@pytest.fixture(scope="module")
def learnt() -> tuple[ModelSpec, dict[str, Tensor]]:
    """A small model with a module that has learnt to draft, as a file; embedding first."""
    layer = Layer(kv=MLA(heads=2, rank=8, nope_dim=8, rope_dim=4, v_dim=8), feed_forward=Dense(hidden=48))
    spec = ModelSpec(name="tiny", vocab=VOCAB, width=24, context=64, layers=(layer,), mtp=MTP())
    model, generator = spec.build(seed=0), torch.Generator().manual_seed(0)
    optimiser, stream = AdamW(lr=2e-2).build(model), Stream.of_lengths([LENGTH] * 8)
    for _ in range(100):
        rows = text(8, generator)
        tokens_T, targets_T = rows[:, :-1].flatten(), rows[:, 1:].flatten()
        micro_loss(model, tokens_T, targets_T, stream, Balance(spec), 192, 192, 0.3).total.backward()
        optimiser.step(1.0)
    return spec, export_weights(model, "deepseek_v3")


@pytest.mark.parametrize(("mtp", "good"), [(MTP(), True), (MTP(order="hidden_first"), False)], ids=["right", "swapped"])
def test_the_order_shows_in_accepted_drafts(learnt, mtp, good):
    """MTP-6. Right, most drafts are; swapped, the file loads without a word and hardly any is."""
    spec, disk = learnt
    model = spec.replace(mtp=mtp).build(seed=9)
    import_weights(model, disk, "deepseek_v3")
    prompts = text(40, torch.Generator().manual_seed(1))[:, :4].tolist()
    answers = speculate(model, prompts, 16)
    kept = sum(answer.kept for answer in answers) / sum(answer.drafts for answer in answers)
    assert kept > 0.8 if good else kept < 0.4
