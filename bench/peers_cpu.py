"""Our twins against transformers' classes on a CPU: same shapes, same batch, same optimiser, in one run.

Training: tokens/s of whole steps (forward, loss, backward, clip, AdamW). Decoding: new tokens/s of greedy generation
after the same prompt, prefill included. Each rival lives in a process of its own, as its users run it, and they take
turns, so that a noisy machine treats them alike. "theirs+" is transformers with our allocator setting
(``sextant.core.allocator``), which it does not make itself: the ratio to it is what our model code alone gains.
Medians; ratios are what to read.

    OMP_NUM_THREADS=2 python bench/peers_cpu.py --out bench/results/peers_cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from sextant import recipes
from sextant.axes.numerics import BF16, FP32
from sextant.core.allocator import keep_freed_memory
from sextant.core.stream import Stream
from sextant.data.loader import Batch
from sextant.kernels.loss import IGNORE
from sextant.model.spec import ModelSpec
from sextant.train.backward import Backward
from sextant.train.balance import Balance
from sextant.train.lanes import lanes_for
from sextant.train.run import Run

ROWS, LENGTH = 8, 256
STEPS = 5
"""Training steps in a row: one alone would begin with caches that other rivals have filled."""
PROMPT, NEW = 64, 128
TWINS = ("mixtral-8x7b", "llama-3-8b")
RIVALS = ("ours", "theirs", "theirs+")
JOBS = ("train", "decode 1", "decode 16")
Turn = Callable[[], int]
"""A few steps or one generation; returns the tokens it made or learnt from."""


def their_model(spec: ModelSpec, dtype: torch.dtype) -> Any:
    """transformers' class for the same shape, random weights."""
    import transformers

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
        config: Any = transformers.LlamaConfig(**common)
    else:
        experts = layer.feed_forward
        config = transformers.MixtralConfig(
            **common, num_local_experts=experts.experts, num_experts_per_tok=experts.router.top_k,
            output_router_logits=True, router_aux_loss_coef=experts.balance[0].coef, sliding_window=None,
        )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def their_training(spec: ModelSpec, dtype: torch.dtype) -> Turn:
    model = their_model(spec, dtype).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> int:
        tokens_BT = torch.randint(2, spec.vocab, (ROWS, LENGTH))
        model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return tokens_BT.numel()

    return step


def our_training(run: Run) -> Turn:
    """As the trainer does it, in the twin's micro-batches and lanes; balance is of the whole batch, as theirs."""
    spec = run.model.override("layers[*].feed_forward.balance[*].scope=global_batch") if routed(run) else run.model
    model = spec.build(run.numerics).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    backward = Backward(model, Balance(spec), lanes_for(model, run.batch.lanes))

    def step() -> int:
        tokens_BT = torch.randint(2, spec.vocab, (ROWS, LENGTH))
        backward([batch_of(rows_RT) for rows_RT in tokens_BT.split(run.batch.micro_rows)])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return tokens_BT.numel()

    return step


def routed(run: Run) -> bool:
    return run.model.layers[0].feed_forward.kind != "dense"


def batch_of(tokens_RT: torch.Tensor) -> Batch:
    """Rows as one micro-batch; the last token of each has nothing to predict."""
    targets_RT = torch.cat([tokens_RT[:, 1:], torch.full_like(tokens_RT[:, :1], IGNORE)], dim=1)
    stream = Stream.of_lengths([LENGTH] * len(tokens_RT))
    return Batch(tokens_RT.flatten(), targets_RT.flatten(), stream, samples=())


def their_decoding(spec: ModelSpec, dtype: torch.dtype, batch: int) -> Turn:
    model = their_model(spec, dtype).eval()
    model.config.output_router_logits = False  # of use in training only, and some versions fail on it here

    def generate() -> int:
        prompt_BT = torch.randint(2, spec.vocab, (batch, PROMPT))
        model.generate(
            prompt_BT, attention_mask=torch.ones_like(prompt_BT), max_new_tokens=NEW, min_new_tokens=NEW,
            do_sample=False, use_cache=True, pad_token_id=0,
        )
        return batch * NEW

    return generate


def our_decoding(run: Run, batch: int) -> Turn:
    from sextant.serve.generate import decode_tokens, lower_weights

    model = lower_weights(run.model.build(run.numerics).eval())

    def generate() -> int:
        prompt_BT = torch.randint(2, run.model.vocab, (batch, PROMPT))
        decode_tokens(model, prompt_BT.tolist(), NEW)
        return batch * NEW

    return generate


def rival(name: str, twin: str, dtype: str, job: str) -> Turn:
    numerics, their_dtype = (BF16(), torch.bfloat16) if dtype == "bf16" else (FP32(), torch.float32)
    run = recipes.get(twin).twin().replace(numerics=numerics)
    kind, _, batch = job.partition(" ")
    if name != "theirs":
        keep_freed_memory()
    if name == "ours":
        return in_a_row(our_training(run)) if kind == "train" else our_decoding(run, int(batch))
    if kind == "train":
        return in_a_row(their_training(run.model, their_dtype))
    return their_decoding(run.model, their_dtype, int(batch))


def in_a_row(step: Turn) -> Turn:
    """Several steps as one turn."""
    return lambda: sum(step() for _ in range(STEPS))


def serve(turn: Turn) -> None:
    """In a rival's process: one turn for every line on stdin, answered with tokens per second."""
    turn()
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        tokens = turn()
        print(tokens / (time.perf_counter() - began), flush=True)


def compete(twin: str, dtype: str, job: str, rounds: int) -> dict[str, float]:
    """Median tokens per second of every rival, taking turns."""
    command = [sys.executable, __file__, "--serve"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    rivals: dict[str, Any] = {
        name: subprocess.Popen([*command, name, twin, dtype, job], **pipes) for name in RIVALS
    }
    rates: dict[str, list[float]] = {name: [] for name in RIVALS}
    for process in rivals.values():
        process.stdout.readline()
    for _ in range(rounds + 1):
        for name, process in rivals.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            rates[name].append(float(process.stdout.readline()))
    for process in rivals.values():
        process.communicate()
    return {name: statistics.median(values[1:]) for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help='one row, such as "llama-3-8b bf16 decode 1", or the start of some')
    parser.add_argument("--serve", nargs=4)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(rival(*arguments.serve))
        return
    rows = []
    for twin, dtype, job in product(TWINS, ("fp32", "bf16"), JOBS):
        if not f"{twin} {dtype} {job}".startswith(arguments.only):
            continue
        rates = compete(twin, dtype, job, arguments.rounds)
        ratios = {f"ratio {name}": rates["ours"] / rates[name] for name in RIVALS[1:]}
        rows.append({"twin": twin, "dtype": dtype, "job": job, **rates, **ratios})
        shown = "  ".join(f"{name} {rate:8.0f}" for name, rate in rates.items())
        gains = "  ".join(f"{name} {ratio:4.2f}" for name, ratio in ratios.items())
        print(f"{twin:13} {dtype} {job:10} tok/s: {shown}   {gains}", flush=True)
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    from importlib.metadata import version

    return {
        "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "transformers": version("transformers"), "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
