"""``config.json`` to declaration: published files, older spellings, and what is refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle_hf import BASE, CASES, LLAMA3

from sextant.axes.attention import Full, Window
from sextant.axes.kv import Llama3Scaling, RoPE
from sextant.axes.routing import SoftmaxTopK
from sextant.convert import spec_from_hf
from sextant.core.errors import UsageError
from sextant.recipes import dbrx, gemma_3, llama_3_8b, mistral_7b, mixtral_8x7b

COMMON = {"hidden_act": "silu", "initializer_range": 0.02, "use_cache": True, "tie_word_embeddings": False}
MISTRAL_7B = COMMON | {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "sliding_window": 4096, "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "vocab_size": 32000,
}
LLAMA_3_8B = COMMON | {
    "attention_bias": False, "attention_dropout": 0.0, "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 500000.0, "vocab_size": 128256,
}
MIXTRAL_8X7B = COMMON | {
    "attention_dropout": 0.0, "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None, "vocab_size": 32000,
}
GEMMA_3_1B = {
    "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None, "bos_token_id": 2,
    "cache_implementation": "hybrid", "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
    "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
    "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 262144,
}
DBRX = {
    "architectures": ["DbrxForCausalLM"], "attn_config": {
        "clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000,
    },
    "auto_map": {"AutoConfig": "configuration_dbrx.DbrxConfig"}, "d_model": 6144, "emb_pdrop": 0.0, "ffn_config": {
        "ffn_hidden_size": 10752, "model_type": "", "moe_jitter_eps": 0.01, "moe_loss_weight": 0.05,
        "moe_num_experts": 16, "moe_top_k": 4,
    },
    "initializer_range": 0.02, "max_seq_len": 32768, "model_type": "dbrx", "n_heads": 48, "n_layers": 40,
    "output_router_logits": False, "resid_pdrop": 0.0, "router_aux_loss_coef": 0.05, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 100352,
}
PUBLISHED = {
    "mistral-7b": (MISTRAL_7B, mistral_7b.paper),
    "llama-3-8b": (LLAMA_3_8B, llama_3_8b.paper),
    "gemma-3-1b": (GEMMA_3_1B, gemma_3.paper_1b),
}
TINY = {"model_type": "llama", **BASE}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_the_recipes(name: str):
    config, paper = PUBLISHED[name]
    assert spec_from_hf(config, name=name) == paper().model


def test_published_mixtral_is_the_recipe_but_for_the_balance_coefficient():
    """The file's coefficient is for layers pooled and shares summing to 2; ours is per layer, with shares of 1."""
    ours = "layers[*].feed_forward.balance=[]"
    spec = spec_from_hf(MIXTRAL_8X7B, name="mixtral-8x7b")
    assert spec.override(ours) == mixtral_8x7b.paper().model.override(ours)
    assert spec.layers[0].feed_forward.balance[0].coef == pytest.approx(0.02 * 2 / 32)


def test_published_dbrx_is_the_recipe_but_for_the_balance_coefficient():
    """MegaBlocks, which trained it, divides by the experts met where transformers does not."""
    ours, recipe = "layers[*].feed_forward.balance=[]", dbrx.paper().model
    spec = spec_from_hf(DBRX, name="dbrx")
    assert spec.override(ours) == recipe.override(ours)
    coefs = [model.layers[0].feed_forward.balance[0].coef for model in (spec, recipe)]
    assert coefs == pytest.approx([0.05 * 4 / 40, 0.05 / 40])


def test_llama_3_1_in_the_older_spelling():
    scaling = {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    spec = spec_from_hf(LLAMA_3_8B | {"max_position_embeddings": 131072, "rope_scaling": scaling})
    expected = RoPE(base=500_000.0, scaling=Llama3Scaling(factor=8.0, original=8192))
    assert {layer.kv.position for layer in spec.layers} == {expected}


def test_gemma_3_text_config_leaves_most_to_defaults():
    """The 4B's nested file says six things; its scaling concerns the global layers alone."""
    spec = spec_from_hf({
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }, name="gemma-3-4b")
    assert spec.override("vocab=262144") == gemma_3.paper_4b().model


@pytest.mark.parametrize("name", CASES)
def test_transformers_prints_what_we_read(name: str):
    """The file that they write, with every field spelled out, is understood to the last one."""
    from transformers import CONFIG_MAPPING

    case = CASES[name]
    spec = spec_from_hf(CONFIG_MAPPING[case.family](**case.fields).to_dict(), name=name)
    assert (spec.name, spec.width, spec.vocab) == (name, 48, 61)
    assert spec.layers[0].kv.shape[:2] == (6, case.config.get("num_key_value_heads", 2))


def test_no_balance_loss_without_a_coefficient():
    config = {**TINY, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    spec = spec_from_hf(config | {"router_aux_loss_coef": 0.0})
    assert {layer.feed_forward.balance for layer in spec.layers} == {()}
    assert spec_from_hf(config).layers[0].feed_forward.balance[0].coef == pytest.approx(0.001 * 2 / 3)


def test_older_and_newer_spellings_of_a_rope_agree():
    older = {"rope_theta": 500.0, "rope_scaling": {**LLAMA3, "type": "llama3"}}
    del older["rope_scaling"]["rope_type"], older["rope_scaling"]["rope_theta"]
    assert spec_from_hf(TINY | older) == spec_from_hf(TINY | {"rope_parameters": LLAMA3})


@pytest.mark.parametrize("more, expected", [
    ({}, Full()), ({"sliding_window": 64}, Window(window=64)), ({"sliding_window": None}, Full()),
    ({"sliding_window": 160}, Full()),  # as long as the context
])
def test_windows_of_mistral(more: dict[str, Any], expected: Any):
    """Left out, it is 4,096, which is beyond this context; null means none."""
    assert spec_from_hf(TINY | {"model_type": "mistral"} | more).layers[0].attention == expected
    long = spec_from_hf(TINY | {"model_type": "mistral", "max_position_embeddings": 8192})
    assert long.layers[0].attention == Window(window=4096)


def test_qwen_layers_without_experts():
    """Every second layer is a mixture, but for those said to be dense; the loss is pooled over the mixtures alone."""
    more = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "router_aux_loss_coef": 0.01}
    config = {**TINY, "model_type": "qwen3_moe", "num_hidden_layers": 6, "decoder_sparse_step": 2, **more}
    spec = spec_from_hf({**config, "mlp_only_layers": [3], "max_window_layers": 28})
    kinds = [layer.feed_forward.kind for layer in spec.layers]
    assert kinds == ["dense", "experts", "dense", "dense", "dense", "experts"]
    (term,) = spec.layers[1].feed_forward.balance
    assert term.coef == pytest.approx(0.01 * 3 / 2)


def test_gates_of_dbrx():
    """Absent is a sum, null is no norm at all, a number is the norm's exponent; the router's noise is read."""
    def router(**more: Any) -> SoftmaxTopK:
        parts = {"attn_config": {"kv_n_heads": 2}, "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, **more}}
        config = {"d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": 160, "vocab_size": 61}
        return spec_from_hf({"model_type": "dbrx", **config, **parts}).layers[0].feed_forward.router

    assert router() == SoftmaxTopK(top_k=2, normalize=True)
    assert router(moe_normalize_expert_weights=None) == SoftmaxTopK(top_k=2)
    assert router(moe_normalize_expert_weights=2.0) == SoftmaxTopK(top_k=2, normalize=True, p_norm=2.0)
    assert router(moe_jitter_eps=0.01) == SoftmaxTopK(top_k=2, normalize=True, jitter=0.01)


@pytest.mark.parametrize("name", ["indexed_attention", "deepseek_sparse_attention"])
def test_layers_with_an_indexer_have_an_older_name(name: str):
    """transformers 5.23's and 5.17's; any other kind, or another number of layers, is refused."""
    from transformers import CONFIG_MAPPING

    case = CASES["deepseek-v32"]
    config = CONFIG_MAPPING[case.family](**case.fields).to_dict()
    assert spec_from_hf(config | {"layer_types": 3 * [name]}) == spec_from_hf(config)
    for kinds in (2 * [name], [name, name, "full_attention"]):
        with pytest.raises(UsageError, match="layer_types"):
            spec_from_hf(config | {"layer_types": kinds})


def test_gemma_layer_types():
    config = {**TINY, "model_type": "gemma3_text", "query_pre_attn_scalar": 9, "sliding_window": 8}
    given = spec_from_hf(config | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]})
    assert [layer.attention.kind for layer in given.layers] == ["full", "window", "full"]
    by_period = spec_from_hf(config | {"sliding_window_pattern": 2})
    assert [layer.attention.kind for layer in by_period.layers] == ["window", "full", "window"]
    assert by_period.layers[0].kv.scale == pytest.approx(1 / 3)
    assert by_period.embedding_scale == math.sqrt(48)


YARNS = [
    {}, {"factor": 8.0}, {"beta_fast": 6.0, "beta_slow": 0.25}, {"truncate": False}, {"attention_factor": 1.7},
    {"mscale": 0.707}, {"mscale_all_dim": 0.5}, {"mscale": 0.707, "mscale_all_dim": 0.5},
    {"mscale": 2, "truncate": False},
]


@pytest.mark.parametrize("more", YARNS)
def test_yarn_variants(more: dict[str, Any]):
    """Frequencies and temperature as transformers computes them; it heeds ``mscale`` only beside ``mscale_all_dim``."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 5.0, "original_max_position_embeddings": 64, **more}
    config = BASE | {"head_dim": 64, "max_position_embeddings": 320, "rope_parameters": rope}
    expected, temperature = ROPE_INIT_FUNCTIONS["yarn"](LlamaConfig(**config), "cpu")
    rotary = spec_from_hf({"model_type": "llama", **config}).layers[0].kv.position.build(6, 64)
    got = torch.tensor(rotary.frequencies, dtype=torch.float64)
    torch.testing.assert_close(expected.double(), got, rtol=1e-6, atol=0)
    assert rotary.magnitude == pytest.approx(temperature, rel=1e-9)


REFUSED = [
    ({"model_type": "gpt2"}, "model_type (got 'gpt2')"),
    ({"model_type": "gemma3", "text_config": {}}, "Pass its text_config"),
    ({"model_type": None}, "got 'None'"),
    ({"attention_bias": True}, "attention_bias (got True, expected False)"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"attention_dropout": 0.1}, "attention_dropout (got 0.1, expected 0.0)"),
    ({"hidden_act": "relu"}, "hidden_act (got 'relu'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"layer_types": ["full_attention"] * 3}, "layer_types"),
    ({"hidden_size": None}, "hidden_size (got 'nothing', expected int)"),
    ({"hidden_size": "48"}, "hidden_size (got '48', expected int)"),
    ({"num_attention_heads": 0}, "num_attention_heads (got 0, expected more than 0)"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps (got nan, expected more than 0)"),
    ({"rope_parameters": {**LLAMA3, "rope_type": "yarn", "original_max_position_embeddings": 0}}, "original_max"),
    ({"model_type": "gemma3_text", "sliding_window": 8, "query_pre_attn_scalar": -1}, "query_pre_attn_scalar (got -1"),
    ({"model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 0}, "sliding_window_pattern (got 0"),
    ({"num_hidden_layers": True}, "num_hidden_layers (got True, expected int)"),
    ({"num_key_value_heads": 4}, "kv_heads 4 must divide heads 6"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters: rope_type (got 'dynamic'"),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: factor"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor (got 0.5, expected 1.0)"),
    ({"rope_parameters": {**LLAMA3, "long_factor": [1.0]}}, "rope_parameters: long_factor"),
    ({"rope_parameters": {**LLAMA3, "low_freq_factor": 9.0}}, "low_factor must be below high_factor"),
    ({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.1}, "jitter"),
    ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}, "top_k 3 exceeds experts 2"),
    ({"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 8.0}, "clip_qkv (got 8.0"),
    ({"model_type": "gemma3_text", "sliding_window": 8, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"model_type": "gemma3_text", "sliding_window": 8, "use_bidirectional_attention": True}, "bidirectional"),
    ({"model_type": "gemma3_text", "sliding_window": 8, "layer_types": ["chunked_attention"] * 3}, "layer_types"),
    ({"model_type": "gemma3_text", "sliding_window": 8, "layer_types": ["full_attention"] * 2}, "2 of full_attention"),
]


@pytest.mark.parametrize("change, message", REFUSED)
def test_refused_by_name(change: dict[str, Any], message: str):
    with pytest.raises(UsageError) as error:
        spec_from_hf({**TINY, **change})
    assert message in error.value.line()
    assert "\n" not in error.value.line()
