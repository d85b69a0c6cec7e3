"""The ragged stream and the decoding states under it."""

import pytest
import torch
from cases import close
from hypothesis import given
from hypothesis import strategies as st

from sextant.core.state import Memory, RowSpec
from sextant.core.stream import Stream


@given(st.lists(st.integers(0, 6), min_size=1, max_size=7))
def test_lengths_positions_and_owners(lengths):
    stream = Stream.of_lengths(lengths)
    assert stream.lengths == lengths
    assert stream.max_len == max(lengths)
    assert stream.cu_seqlens.dtype == torch.int32
    assert stream.cu_seqlens.tolist() == [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    assert stream.positions_T.tolist() == [t for length in lengths for t in range(length)]
    assert stream.sequence_T.tolist() == [b for b, length in enumerate(lengths) for _ in range(length)]
    assert stream.rows == (len(lengths) if len(set(lengths)) == 1 else None)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=7))
def test_packed_from_flags_equals_lengths(lengths):
    starts_T = torch.tensor([t == 0 for length in lengths for t in range(length)])
    packed, listed = Stream.packed(starts_T, max(lengths)), Stream.of_lengths(lengths)
    assert packed.lengths == lengths
    assert torch.equal(packed.positions_T, listed.positions_T)
    assert torch.equal(packed.cu_seqlens, listed.cu_seqlens)
    assert torch.equal(packed.sequence_T, listed.sequence_T)
    assert packed.rows == listed.rows


def test_no_sequences():
    stream = Stream.of_lengths([])
    assert stream.lengths == [] and stream.max_len == 0 and stream.positions_T.numel() == 0


def test_positions_go_on_from_the_memory():
    memory = Memory([RowSpec(1, 2, 2)], batch=2, dtype=torch.float32)
    memory.commit(Stream.of_lengths([3, 1], memory=memory))
    stream = Stream.of_lengths([2, 4], memory=memory)
    assert stream.positions_T.tolist() == [3, 4, 1, 2, 3, 4]
    memory.commit(stream)
    assert memory.lengths == [5, 5]


@pytest.mark.parametrize(
    ("spec", "rows"),
    [(RowSpec(2, 3, 5), [1, 5, 100]), (RowSpec(2, 3, 5, 4), [1, 4, 4]), (RowSpec(2, 3, 5, 4, 2), [1, 5, 6])],
)
def test_declared_rows_and_bytes(spec, rows):
    assert [spec.rows(tokens) for tokens in (1, 5, 100)] == rows
    assert [spec.nbytes(tokens, 2) for tokens in (1, 5, 100)] == [n * 2 * (3 + 5) * 2 for n in rows]
    assert spec.kind == ("paged" if spec.window is None else "ring")


@given(
    window=st.none() | st.integers(1, 5),
    sinks=st.integers(0, 3),
    steps=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12),
)
def test_what_is_visible_is_there_under_its_position(window, sinks, steps):
    """Rows hold their own token number: whatever the order of chunks, every key that a span allows can be read."""
    spec = RowSpec(1, 1, 1, window, sinks if window else 0)
    memory = Memory([spec], batch=2, dtype=torch.float64)
    for lengths in steps:
        stream = Stream.of_lengths(list(lengths), memory=memory)
        row_TGK = stream.positions_T.double()[:, None, None]
        keys = memory.layers[0].append(row_TGK, row_TGK, stream)
        starts = list(memory.lengths)
        memory.commit(stream)
        if keys.positions is None:
            assert starts == [0, 0]
            continue
        for b, (start, total) in enumerate(zip(starts, memory.lengths, strict=True)):
            held = keys.positions[b]
            stored = held[held >= 0]
            assert keys.k[b, 0, held >= 0, 0].tolist() == stored.tolist()
            for t in range(start, total):
                first = 0 if window is None else max(0, t - window + 1)
                needed = {*range(first, t + 1), *range(min(spec.sinks, t + 1))}
                assert needed <= set(stored.tolist())


def test_layers_with_one_span_share_their_slots():
    specs = [RowSpec(1, 2, 2, 4), RowSpec(3, 5, 1, 4), RowSpec(1, 2, 2)]
    memory = Memory(specs, batch=1, dtype=torch.float32)
    assert memory.layers[0].slots is memory.layers[1].slots is not memory.layers[2].slots


def test_sequences_leave():
    """Going on with some sequences, in another order, gives what they alone would give."""
    spec = RowSpec(1, 1, 1, window=3)
    memory = Memory([spec], batch=3, dtype=torch.float64)
    for lengths in ([4, 2, 5], [1, 1, 1], [1, 1, 1]):
        stream = Stream.of_lengths(lengths, memory=memory)
        row_TGK = (stream.positions_T + 100 * stream.sequence_T).double()[:, None, None]
        memory.layers[0].append(row_TGK, row_TGK, stream)
        memory.commit(stream)
    memory.keep([2, 0])
    assert memory.lengths == [7, 6]
    stream = Stream.of_lengths([1, 1], memory=memory)
    assert stream.positions_T.tolist() == [7, 6]
    row_TGK = torch.tensor([207.0, 6.0], dtype=torch.float64)[:, None, None]
    keys = memory.layers[0].append(row_TGK, row_TGK, stream)
    assert keys.positions is not None
    for b, (owner, last) in enumerate([(200, 7), (0, 6)]):
        position_S = keys.positions[b]
        seen = position_S > last - 3
        close(keys.k[b, 0, seen, 0], (owner + position_S[seen]).double())
        assert position_S[seen].tolist() == [last - 2, last - 1, last]


def test_free_slots_hold_finite_numbers():
    """A mask adds minus infinity to a score, which would not hide a NaN from memory never written."""
    memory = Memory([RowSpec(1, 1, 1)], batch=2, dtype=torch.float32)
    for lengths in ([1, 5], [2, 1]):
        stream = Stream.of_lengths(lengths, memory=memory)
        rows_TGK = torch.ones(sum(lengths), 1, 1)
        memory.layers[0].append(rows_TGK, rows_TGK, stream)
        memory.commit(stream)
    assert memory.layers[0].k.isfinite().all() and memory.layers[0].v.isfinite().all()
