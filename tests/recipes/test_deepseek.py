"""DeepSeek-V2, V2-Lite and V3: counts of their parts, their schedules, and the files that were published."""

import pytest

from sextant import recipes
from sextant.axes.capacity import Experts
from sextant.axes.routing import Dropless
from sextant.convert import spec_from_hf
from sextant.core.cost import At
from sextant.core.errors import UsageError
from sextant.recipes import deepseek_v2
from sextant.train.run import check_run

V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001, "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
    "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 1.0,
    "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy",
    "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128, "vocab_size": 102400,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}
"""The released fields (spec deepseek-v3 14.2, 15.1)."""


def test_the_published_file_of_v2_lite_is_the_extended_recipe():
    """But for what acts in training only: the start and the balance loss."""
    paper = deepseek_v2.extended(recipes.get("deepseek-v2-lite").paper().model, mscale=0.707)
    experts = [layer.feed_forward for layer in paper.layers if isinstance(layer.feed_forward, Experts)]
    plain = experts[0].replace(balance=())
    layers = (paper.layers[0], *(layer.replace(feed_forward=plain) for layer in paper.layers[1:]))
    assert len(experts) == 26
    expected = paper.replace(layers=layers, init=paper.init.replace(std=0.02))
    assert spec_from_hf(V2_LITE, name="deepseek-v2-lite") == expected


V2 = V2_LITE | {
    "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_group": 8,
    "n_routed_experts": 160, "num_attention_heads": 128, "num_hidden_layers": 60, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "routed_scaling_factor": 16.0, "topk_group": 3, "topk_method": "group_limited_greedy",
}
V3 = V2 | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "bos_token_id": 0, "eos_token_id": 1,
    "ep_size": 1, "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_nextn_predict_layers": 1, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc", "vocab_size": 129280,
    "rope_scaling": V2_LITE["rope_scaling"] | {"mscale": 1.0, "mscale_all_dim": 1.0},
}


@pytest.mark.parametrize(("name", "config", "mscale"), [("deepseek-v2", V2, 0.707), ("deepseek-v3", V3, 1.0)])
def test_published_files_choose_as_the_recipes_do(name, config, mscale):
    """All but what acts in training only: start, balance, dropping, prediction modules."""
    paper = deepseek_v2.extended(recipes.get(name).paper().model, mscale)
    for ours, read in zip(paper.layers, spec_from_hf(config).layers, strict=True):
        if isinstance(ours.feed_forward, Experts):
            ours = ours.replace(feed_forward=ours.feed_forward.replace(balance=(), overflow=Dropless()))
        assert read == ours


def test_the_prediction_module_of_deepseek_v3():
    """11.61 B of its own; lambda falls, and the bias stops, where the paper says so in tokens (spec 3.3, 8.1)."""
    run = recipes.get("deepseek-v3").paper()
    assert round(run.model.mtp_cost(At(1)).params / 1e9, 2) == 11.61
    bias, sequence = run.model.layers[-1].feed_forward.balance
    full, ramp = 15_360 * 4096, run.batch.ramp[-1][0]
    seen = sum(run.batch.at(step) for step in range(ramp)) * 4096

    def tokens(share: float) -> float:
        return seen + (share * run.steps - ramp) * full

    assert tokens(run.model.mtp.weight.until) == pytest.approx(10e12, rel=1e-4)
    assert tokens(bias.until) == pytest.approx(14.3e12, rel=1e-4)
    assert (bias.rate, sequence.coef, sequence.scope, sequence.counts) == (1e-3, 1e-4, "sequence", "unbiased")
    assert (run.mtp_weight_at(0), run.mtp_weight_at(run.steps - 1)) == (0.3, 0.1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"topk_method": "noaux_tc"}, "topk_method (got 'noaux_tc'"),
        ({"norm_topk_prob": True}, "norm_topk_prob"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"num_key_value_heads": 4}, "num_key_value_heads (got 4, expected 16)"),
        ({"scoring_func": "sigmoid"}, "topk_method (got 'greedy', expected noaux_tc)"),
        ({"topk_method": "group_limited_greedy", "n_group": 7, "topk_group": 2}, "7 does not divide experts 64"),
    ],
)
def test_what_we_do_not_have_is_refused(change, words):
    with pytest.raises(UsageError) as error:
        spec_from_hf(V2_LITE | change)
    assert words in error.value.line()


EXTENDED = [("deepseek-v2-lite", 0.707), ("deepseek-v2", 0.707), ("deepseek-v3", 1.0)]


@pytest.mark.parametrize(("name", "mscale"), EXTENDED)
def test_the_extended_model_is_a_run_too(name, mscale):
    run = recipes.get(name).paper()
    model = deepseek_v2.extended(run.model, mscale)
    check_run(run.replace(model=model))
    assert model.context == 163_840
    assert model.cost(At(1)).params == run.model.cost(At(1)).params


def test_latent_attention_of_deepseek_v3_is_the_published_count():
    """187.11 M per layer, and 35,136 kept numbers per token over its 61 layers (spec deepseek-v3 1.3, 1.6)."""
    model = recipes.get("deepseek-v3").paper().model
    attention = [layer.attention_cost(model.width, At(1)).params for layer in model.layers]
    assert len(attention) == 61 and {round(count / 1e6, 2) for count in attention} == {187.11}
    assert model.cost(At(1, itemsize=1)).state_bytes == 35_136


def test_training_flops_of_deepseek_v3():
    """About 250 GFLOP per token with the backward pass, at 4,096 tokens (spec deepseek-v3 2.7)."""
    model = recipes.get("deepseek-v3").paper().model
    assert 3 * model.cost(At(4096)).flops / 1e9 == pytest.approx(250.5, rel=2e-3)


def test_the_batch_of_deepseek_v3_grows():
    """3,072 rows to 15,360 over 469 B tokens, and 14.8 T tokens in all."""
    run = recipes.get("deepseek-v3").paper()
    rows = [run.batch.at(step) for step in range(0, run.steps, 100)]
    assert (rows[0], rows[-1]) == (3072, 15_360) and rows == sorted(rows)
    growth = sum(run.batch.at(step) for step in range(run.batch.ramp[-1][0])) * 4096
    assert growth == pytest.approx(469e9, rel=1e-3)
    assert growth + (run.steps - run.batch.ramp[-1][0]) * 15_360 * 4096 == pytest.approx(14.8e12, rel=1e-5)
