"""Weights in 8 bits against bf16 on a trained run: bytes, held-out bits per byte, speed of one answer.

``sextant train mixtral-8x7b --steps 150 --device cpu -o RUN; python docs/lab/eight_bit.py RUN``
"""

import time
from argparse import ArgumentParser

import torch

from sextant.axes.numerics import BF16
from sextant.data.loader import heldout
from sextant.data.prepare import opened
from sextant.serve.generate import Weights, decode_tokens, load
from sextant.train.evaluate import evaluate

PROMPT, NEW, ROUNDS, TOKENS = [list(range(1, 65))], 40, 3, 16_384

parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
parser.add_argument("run", help="run folder")
folder = parser.parse_args().run
torch.set_num_threads(1)
print("| weights | bytes each | MiB | bits per byte | tokens/s |\n|---|---|---|---|---|")
for kind in (None, "fp8", "int8"):
    model, tokenizer, run = load(folder, numerics=BF16(), weights=kind)
    bytes_P = torch.from_numpy(tokenizer.token_bytes_P)
    with torch.inference_mode():
        found = evaluate(model, heldout(opened(run.data)[1], run.data.seq_len, 8), bytes_P, TOKENS)
    decode_tokens(model, PROMPT, 4)
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        decode_tokens(model, PROMPT, NEW)
        seconds.append(time.perf_counter() - began)
    held = Weights.of(model)
    print(f"| {kind or 'bf16'} | {held.bytes_each:.2f} | {held.held_bytes / 2**20:.2f} | {found.bpb:.4f} "
          f"| {NEW / min(seconds):.0f} |")
