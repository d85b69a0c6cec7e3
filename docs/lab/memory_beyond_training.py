"""Held-out bits per byte at 1,024 tokens of a dense model trained on 256, under patterns that need no training.

    sextant train llama-3-8b && python docs/lab/memory_beyond_training.py runs/llama-3-8b-twin
"""

from argparse import ArgumentParser
from pathlib import Path

import torch

from sextant import recipes
from sextant.axes.attention import Full, InfLLM, Window
from sextant.data.loader import heldout
from sextant.data.prepare import opened
from sextant.train import checkpoint
from sextant.train.evaluate import evaluate

MEMORY = recipes.get("infllm").twin().model.layers[0].attention
PATTERNS = (Full(), Window(window=256), MEMORY, InfLLM(**{**MEMORY.to_dict(), "window": 192, "top_k": 3}),
            Window(window=64), Window(window=64, sinks=16))

parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
parser.add_argument("run", type=Path, help="run folder of llama-3-8b's twin")
found, _ = checkpoint.search(parser.parse_args().run / "checkpoints")
run = recipes.get("infllm").twin()
_, shards, tokenizer = opened(run.data)
for pattern in PATTERNS:
    layers = tuple(layer.replace(attention=pattern) for layer in run.model.layers)
    model = run.model.replace(layers=layers).build()
    model.load_state_dict(found.parts["model"])
    result = evaluate(model, heldout(shards, 1024, 2), torch.from_numpy(tokenizer.token_bytes_P), 16_000)
    print(f"{result.bpb:.4f}  {pattern}")
