"""A small tokenizer, small models of three kinds, and a run folder as training leaves it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sextant.axes.attention import Full, Window
from sextant.axes.capacity import Dense, Experts
from sextant.axes.kv import GQA, NoPE, RoPE
from sextant.axes.routing import SoftmaxTopK
from sextant.data.spec import Data
from sextant.data.tokenizer import Tokenizer
from sextant.model.spec import ModelSpec, repeat, stack
from sextant.model.transformer import Transformer
from sextant.train import checkpoint
from sextant.train.run import Run

VOCAB = 300
TEXT = "the cat sat on the mat and the dog ran to the cat; naïve café 猫と犬 🙂 "


def spec(name: str = "small", context: int = 96, tied: bool = True, vocab: int = VOCAB) -> ModelSpec:
    """Windows and a full layer, grouped heads, a mixture of experts."""
    return ModelSpec(
        name=name, vocab=vocab, width=32, context=context, tied=tied,
        layers=stack(
            3, attention=repeat([Window(window=5), Window(window=4, sinks=2), Full()], 3),
            kv=repeat([*(2 * [GQA(heads=4, kv_heads=2, head_dim=8, position=RoPE())]),
                       GQA(heads=4, kv_heads=2, head_dim=8, position=NoPE())], 3),
            feed_forward=repeat([Dense(hidden=48), Experts(experts=4, hidden=24, router=SoftmaxTopK(top_k=2))], 3),
        ),
    )


def loud(model: Transformer) -> Transformer:
    """Weights large enough that logits differ clearly: greedy choices must not hang on the last bit."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT * 20], VOCAB)


@pytest.fixture(scope="session")
def model() -> Transformer:
    return loud(spec().build(seed=3)).eval()


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, model: Transformer) -> Path:
    """``config.yaml``, ``tokenizer.json`` and the checkpoints of steps 1 and 2, the second with ``model``'s weights."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    folder.mkdir()
    run = Run(name="small", model=model.spec, data=Data(vocab=VOCAB, seq_len=32), steps=2)
    run.save(folder / "config.yaml")
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    identity = {"recipe": "small", "tokenizer": tokenizer.digest}
    older = spec().build(seed=9)
    checkpoint.save(folder / "checkpoints", 1, {"model": older.state_dict()}, {}, identity)
    checkpoint.save(folder / "checkpoints", 2, {"model": model.state_dict()}, {}, identity)
    return folder
