"""The phone book asks only for what it told, far enough away; a small model learns its first lesson."""

import importlib.util
from pathlib import Path

import torch

from sextant.axes.attention import Full
from sextant.axes.capacity import Dense
from sextant.axes.kv import GQA
from sextant.axes.stability import NormalInit, RMSNorm
from sextant.lab import grid
from sextant.lab.recall import PhoneBook, learn
from sextant.model.spec import ModelSpec, stack

NEEDLE = Path(__file__).resolve().parents[2] / "docs" / "lab" / "needle.py"


def tiny(names: int) -> ModelSpec:
    """A model of two layers for books with so many names."""
    kv = GQA(heads=2, kv_heads=2, head_dim=16, qk_norm=RMSNorm())
    layers = stack(2, attention=Full(), kv=kv, feed_forward=Dense(hidden=32))
    return ModelSpec(
        name="tiny", vocab=1 + 2 * names, width=32, context=64, layers=layers, init=NormalInit(std=0.1)
    )


def test_every_answer_stands_in_the_book():
    task = PhoneBook(pairs=6, book=20, gap=7, names=11)
    tokens_BT, targets_BT = task.batch(50, torch.Generator().manual_seed(0))
    assert tokens_BT.shape == (50, 20 + 7 + 12) == (50, task.length) and tokens_BT.max() < task.vocab
    for tokens, targets in zip(tokens_BT.tolist(), targets_BT.tolist(), strict=True):
        book = {tokens[i]: tokens[i + 1] for i in range(0, 20, 2) if tokens[i]}
        asked = {tokens[t]: targets[t] for t in range(task.length) if targets[t] >= 0}
        assert len(book) == 6 and asked == book
        assert not any(tokens[20:27]) and all(target == -100 for target in targets[:27])


def test_fewer_scored_answers_and_another_habit():
    task = PhoneBook(pairs=6, book=12, gap=0, names=11, scored=2, shift=1)
    tokens_BT, targets_BT = task.batch(20, torch.Generator().manual_seed(0))
    assert (targets_BT >= 0).sum(1).tolist() == [2] * 20
    for tokens, targets in zip(tokens_BT.tolist(), targets_BT.tolist(), strict=True):
        book = {tokens[i]: tokens[i + 1] for i in range(0, 12, 2)}
        for t in (20, 22):
            assert targets[t] - 12 == (book[tokens[t]] - 12 + 1) % 11


def test_a_lesson_is_learnt_and_seeds_repeat():
    task = PhoneBook(pairs=2, book=4, gap=0, names=4)
    curves = [learn(tiny(4).build(seed=0), [task], 60, 0, rows=16, rate=1e-2) for _ in range(2)]
    assert curves[0] == curves[1]
    assert curves[0][-1][1] < 0.8 * curves[0][0][1]


def test_a_needle_model_begins_again_until_a_start_reaches_the_last_lesson(monkeypatch):
    found = importlib.util.spec_from_file_location("needle", NEEDLE)
    lab = importlib.util.module_from_spec(found)
    found.loader.exec_module(lab)
    learnt = []

    def learn_like(leaving: int):
        def learn(model, lessons, steps, seed, **rest):
            learnt.append(seed)
            return [(700, 0.1, 1.0)] if len(learnt) == leaving else [(steps, 2.0, 0.0)]

        learnt.clear()
        return learn

    monkeypatch.setattr(lab, "learn", learn_like(2))
    assert lab.run("full", 5, 1500)["starts"] == 2 and learnt == [5, 105]
    monkeypatch.setattr(lab, "learn", learn_like(0))
    cell = lab.run("window", 5, 1500)
    assert cell["starts"] == 4 and learnt == [5, 105, 205, 305] and cell["curve"] == [(1500, 2.0, 0.0)]


def test_cells_are_run_once(tmp_path):
    ran = []

    def run(arm: str, seed: int) -> grid.Cell:
        ran.append((arm, seed))
        return {"value": seed}

    for _ in range(2):
        cells = grid.fill(tmp_path, ["a b", "c"], [0, 1], run, lambda line: None)
    assert cells["a b", 1] == {"value": 1} and len(ran) == 4
