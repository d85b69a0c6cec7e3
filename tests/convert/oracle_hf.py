"""The models that ours are compared with: tiny random ones of transformers, taken through a saved folder."""

from __future__ import annotations

import copy
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sextant.convert import import_weights, spec_from_hf
from sextant.model.transformer import Transformer

os.environ["HF_HUB_OFFLINE"] = "1"

VOCAB = 61
BASE = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "pad_token_id": None, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 160,
}


@dataclass(frozen=True)
class Case:
    """A configuration of transformers, the standard deviation of its matrices, and a length beyond all its windows."""

    family: str
    config: dict[str, Any]
    std: float = 0.2
    length: int = 61
    base: dict[str, Any] = field(default_factory=lambda: BASE)

    @property
    def fields(self) -> dict[str, Any]:
        """Of the configuration class."""
        return {**self.base, **self.config}


# bases are small, so that the slow channels turn a good way, too, within the few tokens of a test
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
GEMMA_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
}

MLA = {
    "num_key_value_heads": 6, "head_dim": 8, "kv_lora_rank": 20, "q_lora_rank": 14, "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 3, "rms_norm_eps": 1e-6,
}
"""All layers dense, but where experts follow."""
V2_YARN = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}
V3_YARN = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
V2_EXPERTS = {
    "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2,
    "moe_intermediate_size": 20, "routed_scaling_factor": 1.5, "topk_method": "greedy",
}
V2_GROUPS = {
    "n_routed_experts": 12, "num_experts_per_tok": 4, "topk_method": "group_limited_greedy", "n_group": 4,
    "topk_group": 2, "routed_scaling_factor": 4.0,
}
V3_EXPERTS = {
    "first_k_dense_replace": 1, "n_routed_experts": 12, "num_experts_per_tok": 4, "n_shared_experts": 1,
    "moe_intermediate_size": 20, "n_group": 4, "topk_group": 2,
}
INDEX = {"index_n_heads": 16, "index_head_dim": 12, "index_topk": 7}

EXPERTS_OF_QWEN = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
DBRX_BASE = {
    "vocab_size": VOCAB, "d_model": 48, "n_layers": 3, "n_heads": 6, "max_seq_len": 160, "pad_token_id": None,
    "bos_token_id": 1, "eos_token_id": 2,
}
DBRX = {
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.9, "rope_theta": 500.0},
    "ffn_config": {"ffn_hidden_size": 20, "moe_num_experts": 6, "moe_top_k": 3, "moe_loss_weight": 0.05},
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}

CASES = {
    "llama": Case("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
    "llama-tied": Case("llama", {"tie_word_embeddings": True, "head_dim": 8, "num_key_value_heads": 6}),
    "llama-yarn": Case("llama", {"rope_parameters": YARN}, length=127),
    "llama-llama3": Case("llama", {"rope_parameters": LLAMA3}, length=127),
    "mistral": Case("mistral", {"sliding_window": 9}),
    "mixtral": Case("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.03}),
    "olmoe": Case("olmoe", {"intermediate_size": 20, "num_experts": 7, "num_experts_per_tok": 3, "head_dim": 8}),
    "qwen3-moe": Case(
        "qwen3_moe", {**EXPERTS_OF_QWEN, "norm_topk_prob": True, "mlp_only_layers": [1], "router_aux_loss_coef": 0.02}
    ),
    "qwen3-moe-windows": Case(
        "qwen3_moe", {**EXPERTS_OF_QWEN, "use_sliding_window": True, "sliding_window": 9, "decoder_sparse_step": 2}
    ),
    "dbrx": Case("dbrx", DBRX, base=DBRX_BASE),
    "gemma3": Case(
        "gemma3_text",
        {
            "num_hidden_layers": 6, "sliding_window": 8, "query_pre_attn_scalar": 10, "rms_norm_eps": 1e-6,
            "rope_parameters": GEMMA_ROPES, "final_logit_softcapping": 20.0,
        },
        std=0.25,
    ),
    "deepseek-v2": Case("deepseek_v2", {**MLA, **V2_EXPERTS, "rope_parameters": V2_YARN}, length=127),
    "deepseek-v2-lite": Case("deepseek_v2", {**MLA, **V2_EXPERTS, "q_lora_rank": None, "attention_bias": True}),
    "deepseek-v2-groups": Case("deepseek_v2", {**MLA, **V2_EXPERTS, **V2_GROUPS}),
    "deepseek-v3": Case(
        "deepseek_v3", {**MLA, **V3_EXPERTS, "rope_parameters": V3_YARN, "attention_bias": True}, length=127
    ),
    "deepseek-v3-one-group": Case(
        "deepseek_v3", {**MLA, **V3_EXPERTS, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}
    ),
    "deepseek-v3-half": Case(
        "deepseek_v3",
        {**MLA, "q_lora_rank": None, "rope_interleave": False, "rope_parameters": {**YARN, "mscale_all_dim": 0.8}},
        length=127,
    ),
    "deepseek-v32": Case("deepseek_v32", {**MLA, **V3_EXPERTS, **INDEX, "rope_parameters": V3_YARN}, length=61),
}


@dataclass(frozen=True)
class Pair:
    """Theirs, and ours filled from what theirs saved."""

    case: Case
    theirs: Any
    ours: Transformer
    config: dict[str, Any]
    disk: dict[str, Tensor]


def make_pair(case: Case, folder: Path) -> Pair:
    """Both models with the same random weights; gains are random too."""
    theirs = build_theirs(case)
    disk = saved(theirs, folder)
    config = json.loads((folder / "config.json").read_text())
    ours = spec_from_hf(config).build(seed=1)
    import_weights(ours, disk, case.family)
    return Pair(case, theirs, ours, config, disk)


def build_theirs(case: Case) -> Any:
    """A transformers model in fp32 on the CPU, every parameter random."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = CONFIG_MAPPING[case.family](**case.fields)
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    generator = torch.Generator().manual_seed(7)
    offset = 0.0 if case.family == "gemma3_text" else 1.0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, case.std, generator=generator)
            else:
                parameter.uniform_(offset - 0.5, offset + 0.5, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith(".e_score_correction_bias"):
                buffer.uniform_(-0.3, 0.3, generator=generator)
    return model


def saved(model: Any, folder: Path) -> dict[str, Tensor]:
    """What transformers writes for this model, by name on disk."""
    model.save_pretrained(folder)
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def gradients_on_disk(model: Any, folder: Path) -> dict[str, Tensor]:
    """Gradients under names on disk, through transformers' own writer: it only moves and cuts tensors.

    Tensors without one, such as its indexers, which never learn, and its routers' biases, are left out.
    """
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    carrier = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in carrier.named_parameters():
            grad = grads[name]
            parameter.copy_(torch.full_like(parameter, math.nan) if grad is None else grad)
        for buffer in carrier.buffers():
            buffer.fill_(math.nan)
    return {name: tensor for name, tensor in saved(carrier, folder).items() if not tensor.isnan().all()}


def tokens(*shape: int, seed: int = 3) -> Tensor:
    """Random token numbers."""
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def gap(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value expected."""
    got, expected = got.detach(), expected.detach()
    return float((got - expected).abs().max() / expected.abs().max())
