"""Our twins against transformers' classes on a CPU: same shapes, same batch, same optimiser, in one run.

Training: tokens/s of whole steps (forward, loss, backward, clip, AdamW), rivals taking turns. Decoding: new tokens/s of
greedy generation after the same prompt. Medians; ratios are what to read.

    OMP_NUM_THREADS=2 python bench/peers_cpu.py [--rounds 12] [--out bench/results/peers_cpu.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import nn

from sextant import recipes
from sextant.axes.numerics import BF16, FP32
from sextant.core.stream import Stream
from sextant.model.spec import ModelSpec
from sextant.serve.generate import decode_tokens, lower_weights
from sextant.train.loss import Balance, micro_loss
from sextant.train.run import Run

ROWS, LENGTH = 8, 256
PROMPT, NEW = 64, 128


def their_config(spec: ModelSpec) -> Any:
    """The same shape as a transformers configuration."""
    layer: Any = spec.layers[0]
    common: dict[str, Any] = {
        "vocab_size": spec.vocab, "hidden_size": spec.width, "num_hidden_layers": len(spec.layers),
        "num_attention_heads": layer.kv.heads, "num_key_value_heads": layer.kv.kv_heads,
        "head_dim": layer.kv.head_dim, "intermediate_size": layer.feed_forward.hidden,
        "max_position_embeddings": spec.context, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": layer.kv.position.base},
        "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
    }
    if layer.feed_forward.kind == "dense":
        return transformers.LlamaConfig(**common)
    experts = layer.feed_forward
    return transformers.MixtralConfig(
        **common, num_local_experts=experts.experts, num_experts_per_tok=experts.router.top_k,
        output_router_logits=True, router_aux_loss_coef=experts.balance[0].coef, sliding_window=None,
    )


def their_step(spec: ModelSpec, dtype: torch.dtype) -> Callable[[torch.Tensor], None]:
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(their_config(spec), dtype=dtype).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(tokens_BT: torch.Tensor) -> None:
        model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def our_step(run: Run) -> Callable[[torch.Tensor], None]:
    model = run.model.build(run.numerics).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    balance = Balance(run.model)

    def step(tokens_BT: torch.Tensor) -> None:
        targets_BT = torch.cat([tokens_BT[:, 1:], torch.full_like(tokens_BT[:, :1], -100)], dim=1)
        balance.start()
        stream = Stream.of_lengths([tokens_BT.shape[1]] * tokens_BT.shape[0])
        predicted = tokens_BT.numel() - tokens_BT.shape[0]
        loss = micro_loss(
            model, tokens_BT.flatten(), targets_BT.flatten(), stream, balance, predicted, tokens_BT.numel()
        )
        loss.total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def tokens_per_second(rivals: dict[str, Callable[[torch.Tensor], None]], vocab: int, rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(rounds + 2):
        tokens_BT = torch.randint(2, vocab, (ROWS, LENGTH))
        for name, step in rivals.items():
            began = time.perf_counter()
            step(tokens_BT)
            if turn >= 2:
                times[name].append(time.perf_counter() - began)
    return {name: ROWS * LENGTH / statistics.median(seconds) for name, seconds in times.items()}


def decode_rates(run: Run, dtype: torch.dtype, batch: int, rounds: int) -> dict[str, float]:
    ours = run.model.build(run.numerics).eval()
    if dtype is torch.bfloat16:
        lower_weights(ours)
    theirs: Any = transformers.AutoModelForCausalLM.from_config(their_config(run.model), dtype=dtype).eval()
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in range(rounds + 1):
        prompt_BT = torch.randint(2, run.model.vocab, (batch, PROMPT))
        began = time.perf_counter()
        decode_tokens(ours, prompt_BT.tolist(), NEW)
        middle = time.perf_counter()
        theirs.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), **options)
        ended = time.perf_counter()
        if turn:
            times["ours"].append(middle - began)
            times["theirs"].append(ended - middle)
    return {name: batch * NEW / statistics.median(seconds) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name in ("mixtral-8x7b", "llama-3-8b"):
        for label, dtype, numerics in (("fp32", torch.float32, FP32()), ("bf16", torch.bfloat16, BF16())):
            run = recipes.get(name).twin().replace(numerics=numerics)
            rivals = {"ours": our_step(run), "theirs": their_step(run.model, dtype)}
            rates = tokens_per_second(rivals, run.model.vocab, arguments.rounds)
            rows.append((name, label, f"train {ROWS}x{LENGTH}", rates["ours"], rates["theirs"]))
            print_row(rows[-1])
            for batch in (1, 16):
                rates = decode_rates(run, dtype, batch, max(3, arguments.rounds // 3))
                rows.append((name, label, f"decode batch {batch}", rates["ours"], rates["theirs"]))
                print_row(rows[-1])
    if arguments.out:
        machine = {
            "cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
        }
        columns = ("twin", "dtype", "job", "ours tok/s", "theirs tok/s")
        results = [dict(zip(columns, row, strict=True)) | {"ratio": row[3] / row[4]} for row in rows]
        arguments.out.write_text(json.dumps({"machine": machine, "rows": results}, indent=1) + "\n")


def print_row(row: tuple[str, str, str, float, float]) -> None:
    name, label, job, ours, theirs = row
    rates = f"ours {ours:9.0f}  theirs {theirs:9.0f}  ratio {ours / theirs:5.2f}"
    print(f"{name:14} {label:5} {job:16} {rates}", flush=True)


if __name__ == "__main__":
    main()
