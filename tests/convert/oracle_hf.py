"""The models that ours are compared with: tiny random ones of transformers, taken through a saved folder."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass
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

CASES = {
    "llama": Case("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
    "llama-tied": Case("llama", {"tie_word_embeddings": True, "head_dim": 8, "num_key_value_heads": 6}),
    "llama-yarn": Case("llama", {"rope_parameters": YARN}, length=127),
    "llama-llama3": Case("llama", {"rope_parameters": LLAMA3}, length=127),
    "mistral": Case("mistral", {"sliding_window": 9}),
    "mixtral": Case("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.03}),
    "gemma3": Case(
        "gemma3_text",
        {
            "num_hidden_layers": 6, "sliding_window": 8, "query_pre_attn_scalar": 10, "rms_norm_eps": 1e-6,
            "rope_parameters": GEMMA_ROPES, "final_logit_softcapping": 20.0,
        },
        std=0.25,
    ),
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
    config = CONFIG_MAPPING[case.family](**{**BASE, **case.config})
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
    return model


def saved(model: Any, folder: Path) -> dict[str, Tensor]:
    """What transformers writes for this model, by name on disk."""
    model.save_pretrained(folder)
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def gradients_on_disk(model: Any, folder: Path) -> dict[str, Tensor]:
    """Gradients under names on disk, through transformers' own writer: it only moves and cuts tensors."""
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    carrier = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in carrier.named_parameters():
            parameter.copy_(grads[name])
    return saved(carrier, folder)


def tokens(*shape: int, seed: int = 3) -> Tensor:
    """Random token numbers."""
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def gap(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value expected."""
    got, expected = got.detach(), expected.detach()
    return float((got - expected).abs().max() / expected.abs().max())
