"""Batches: the same order for every world and batch size, exact resume, no target across documents, all bytes once."""

import json
import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sextant.core.errors import CheckpointError, DataError, UsageError
from sextant.data.dataset import Shards
from sextant.data.loader import IGNORE, Batch, Loader, bytes_of, heldout
from sextant.data.spec import Data

KINDS = ["concat", "best_fit"]


def loader(folder: Path, seq_len: int = 24, rank: int = 0, world: int = 1, **data: object) -> Loader:
    spec = Data(source=str(folder), seq_len=seq_len, **data)  # type: ignore[arg-type]
    return Loader(Shards(folder), spec, rank=rank, world=world)


def same(a: Batch, b: Batch) -> bool:
    pairs = [(a.tokens_T, b.tokens_T), (a.targets_T, b.targets_T), (a.stream.cu_seqlens, b.stream.cu_seqlens)]
    return a.samples == b.samples and all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("packing", KINDS)
def test_order_is_the_same_for_every_world_and_batch_size(prepared: Path, packing: str) -> None:
    whole = loader(prepared, packing=packing).take(64)
    for world in (1, 2, 4):
        ranks = [loader(prepared, rank=rank, world=world, packing=packing) for rank in range(world)]
        rng, tokens, samples = random.Random(world), [], []
        while len(samples) < 64:
            rows = world * rng.randrange(1, 5)
            rows = min(rows, 64 - len(samples))
            for batch in [each.take(rows) for each in ranks]:
                tokens.append(batch.tokens_T)
                samples += batch.samples
        assert samples == list(range(64)) and torch.equal(torch.cat(tokens), whole.tokens_T)


@pytest.mark.parametrize("packing", KINDS)
def test_resume_is_exact_at_any_cut_and_world(prepared: Path, packing: str) -> None:
    straight = loader(prepared, packing=packing)
    total = 2 * straight.rows_per_epoch + 5
    expected = [straight.take(1) for _ in range(total)]
    for cut in {0, 1, straight.rows_per_epoch - 1, straight.rows_per_epoch, straight.rows_per_epoch + 1, total - 4}:
        first = loader(prepared, packing=packing)
        first.skip(cut) if cut else None
        state = json.loads(json.dumps(first.state_dict()))
        second = loader(prepared, packing=packing)
        second.load_state_dict(state)
        assert same(second.take(1), expected[cut])
        pair = [loader(prepared, packing=packing, rank=rank, world=2) for rank in (0, 1)]
        for each, sample in zip(pair, (cut, cut + 1), strict=True):
            each.load_state_dict(state)
            assert same(each.take(2), expected[sample])


def test_state_of_other_data_is_refused(prepared: Path, of_lengths: Callable[[list[int]], Path]) -> None:
    state = loader(prepared).state_dict()
    for change in ({"seq_len": 25}, {"seed": 1}, {"packing": "best_fit"}):
        with pytest.raises(CheckpointError, match=f"data {next(iter(change))}"):
            loader(prepared, **change).load_state_dict(state)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="data tokens"):
        loader(of_lengths([40, 30])).load_state_dict(state)
    loader(prepared, epochs=9).load_state_dict(state)  # more epochs are the same order


def test_epochs_differ_and_seeds_differ(prepared: Path) -> None:
    one = loader(prepared)
    first, second = one.take(one.rows_per_epoch), one.take(one.rows_per_epoch)
    other = loader(prepared, seed=1).take(one.rows_per_epoch)
    assert one.epoch == 2
    rows = [sorted(batch.tokens_T.view(-1, 24).tolist()) for batch in (first, second)]
    assert rows[0] != rows[1]  # documents have other neighbours, not only rows another order
    assert not torch.equal(first.tokens_T, second.tokens_T) and not torch.equal(first.tokens_T, other.tokens_T)


@pytest.mark.parametrize("packing", KINDS)
@pytest.mark.parametrize("seq_len", [1, 7, 24, 301])
def test_an_epoch_has_every_token_once(prepared: Path, packing: str, seq_len: int) -> None:
    one = loader(prepared, seq_len, packing=packing)
    batch = one.take(one.rows_per_epoch)
    shards = one.shards
    documents = [shards.document(i).tolist() for i in range(len(shards))]
    targets = batch.targets_T[batch.targets_T != IGNORE].tolist()
    assert Counter(targets) == Counter(token for ids in documents for token in ids[1:])
    padding = batch.tokens_T.numel() - shards.tokens
    expected = Counter(token for ids in documents for token in ids)
    expected[shards.tokenizer.eot_id] += padding
    assert Counter(batch.tokens_T.tolist()) == expected
    assert batch.predicted == shards.tokens - len(shards)


@pytest.mark.parametrize("packing", KINDS)
def test_sequences_are_pieces_of_one_document(prepared: Path, packing: str) -> None:
    """In masked rows each sequence of the stream, with its targets, is a stretch of one document or padding."""
    one = loader(prepared, packing=packing)
    batch = one.take(one.rows_per_epoch)
    eot = one.shards.tokenizer.eot_id
    texts = ["," + ",".join(map(str, one.shards.document(i).tolist())) + "," for i in range(len(one.shards))]
    bounds = batch.stream.cu_seqlens.tolist()
    for start, stop in pairwise(bounds):
        tokens, targets = batch.tokens_T[start:stop].tolist(), batch.targets_T[start:stop].tolist()
        if set(targets) == {IGNORE}:
            assert set(tokens) == {eot} or stop - start == 1
            continue
        assert targets[:-1] == tokens[1:] and IGNORE not in targets[:-1]
        stretch = tokens + [target for target in targets[-1:] if target != IGNORE]
        assert any("," + ",".join(map(str, stretch)) + "," in text for text in texts)
        assert (targets[-1] == IGNORE) == (tokens[-1] == eot)
    assert set(batch.stream.positions_T[torch.tensor(bounds[:-1])].tolist()) == {0}
    assert batch.stream.max_len == 24 and max(batch.stream.lengths) <= 24


@pytest.mark.parametrize("packing", KINDS)
def test_without_masks_rows_are_the_sequences(prepared: Path, packing: str) -> None:
    one = loader(prepared, packing=packing, mask_documents=False)
    masked = loader(prepared, packing=packing)
    plain, split = one.take(one.rows_per_epoch), masked.take(one.rows_per_epoch)
    assert plain.stream.rows == one.rows_per_epoch and set(plain.stream.lengths) == {24}
    assert torch.equal(plain.tokens_T, split.tokens_T)
    assert plain.predicted > split.predicted  # also the first token of the next document
    kept = split.targets_T != IGNORE
    assert torch.equal(plain.targets_T[kept], split.targets_T[kept])
    if packing == "concat":
        assert plain.predicted == one.shards.tokens - 1


def test_concat_rows_overlap_by_one_token(of_lengths: Callable[[list[int]], Path]) -> None:
    one = loader(of_lengths([40]), seq_len=8, mask_documents=False)
    rows = {int(number): one.row(sample) for sample, number in enumerate(one._rows)}
    document = one.shards.document(0)
    assert [rows[0].tokens_T.tolist(), rows[0].targets_T.tolist()] == [document[:8].tolist(), document[1:9].tolist()]
    assert rows[4].targets_T.tolist() == [*document[33:40].tolist(), IGNORE]


@pytest.mark.parametrize("packing", KINDS)
def test_odd_lengths_and_one_token_documents(of_lengths: Callable[[list[int]], Path], packing: str) -> None:
    sizes = [1, 1, 15, 16, 17, 33, 1, 2, 64]
    one = loader(of_lengths(sizes), 16, packing=packing)
    assert sorted(one.shards.lengths_N.tolist()) == sorted([*sizes, 2][: len(one.shards)])
    batch = one.take(one.rows_per_epoch)
    assert batch.predicted == int((one.shards.lengths_N - 1).sum())


@pytest.mark.parametrize("packing", KINDS)
def test_epochs_are_used_up(prepared: Path, packing: str) -> None:
    one = loader(prepared, packing=packing, epochs=2)
    one.skip(2 * one.rows_per_epoch - 3)
    with pytest.raises(DataError, match=r"too few samples: data\.epochs 2 \(got 3 left of .* Raise") as caught:
        one.take(4)
    assert caught.value.exit_code == 3
    assert one.take(3).samples[-1] == 2 * one.rows_per_epoch - 1
    with pytest.raises(DataError):
        one.skip(1)


def test_too_few_tokens_for_a_row(of_lengths: Callable[[list[int]], Path]) -> None:
    folder = of_lengths([9, 7])
    assert loader(folder, seq_len=15).take(1).predicted > 0
    with pytest.raises(DataError, match=r"fewer tokens than one row: .* \(got 16, expected .* = 17\)"):
        loader(folder, seq_len=16)


def test_processes_and_rows_must_fit(prepared: Path) -> None:
    with pytest.raises(UsageError, match="no such process"):
        loader(prepared, rank=2, world=2)
    for rows in (0, 3, -2):
        with pytest.raises(UsageError, match="rows must divide"):
            loader(prepared, world=2).take(rows)


@given(st.integers(1, 90), st.integers(1, 9))
def test_heldout_predicts_every_token_once(seq_len: int, rows: int) -> None:
    shards = HELD[0]
    seen: list[int] = []
    samples: list[int] = []
    for batch in heldout(shards, seq_len, rows):
        assert len(batch.samples) <= rows and max(batch.stream.lengths) <= seq_len
        assert IGNORE not in batch.targets_T
        bounds = batch.stream.cu_seqlens.tolist()
        for start, stop in pairwise(bounds):
            assert batch.tokens_T[start + 1 : stop].tolist() == batch.targets_T[start : stop - 1].tolist()
        seen += batch.targets_T.tolist()
        samples += batch.samples
    assert seen == [token for i in range(len(shards)) for token in shards.document(i)[1:].tolist()]
    assert samples == list(range(len(samples)))


@given(st.integers(1, 90))
def test_heldout_counts_every_byte_but_those_of_first_tokens(seq_len: int) -> None:
    shards = HELD[0]
    sizes_P = shards.tokenizer.token_bytes_P
    counted = sum(bytes_of(batch.targets_T, sizes_P) for batch in heldout(shards, seq_len, 3))
    firsts = sum(int(sizes_P[shards.document(i)[0]]) for i in range(len(shards)))
    assert counted == shards.counts.bytes - firsts > 0


def test_bytes_of_ignores_what_is_not_predicted() -> None:
    sizes_P = np.array([0, 1, 4])
    assert bytes_of(torch.tensor([2, IGNORE, 1, 0, 2]), sizes_P) == 9
    assert bytes_of(torch.tensor([IGNORE]), torch.from_numpy(sizes_P)) == 0


def test_batches_move(prepared: Path) -> None:
    batch = loader(prepared).take(2)
    moved = batch.to("meta")
    assert {moved.tokens_T.device.type, moved.targets_T.device.type, moved.stream.cu_seqlens.device.type} == {"meta"}
    assert moved.samples == batch.samples and moved.stream.max_len == batch.stream.max_len


HELD: list[Shards] = []


@pytest.fixture(scope="module", autouse=True)
def _held(prepared: Path) -> None:
    HELD.append(Shards(prepared, "heldout"))
