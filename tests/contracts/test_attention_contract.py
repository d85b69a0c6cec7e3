"""Attention x KV x position, every example of every row: causal, ragged, and the same however it is fed.

The contract: prefill = chunked prefill = step-by-step decode = packed with neighbours, and documents never see each
other. Run in fp64, where 1e-11 leaves no room for a wrong key.
"""

import pytest
import torch
from cases import DENSE, MOE, built, chunked, close, combinations, examples, params, random_tokens, run
from torch import Tensor

from sextant.axes.attention import TABLE as ATTENTION
from sextant.axes.attention import Full, Window
from sextant.axes.kv import RoPE
from sextant.core.cost import At
from sextant.core.state import Memory
from sextant.core.stream import Stream

ALL = params(combinations())
EVERY_PATTERN = params((attention, kv) for attention, kv in combinations() if kv.shape == (4, 2, 8, 8))
EVERY_STATE = params((attention, kv) for attention, kv in combinations() if kv.position == RoPE())
T = 11


@pytest.mark.parametrize(("attention", "kv"), ALL)
def test_token_changes_nothing_before_it(attention, kv):
    """Through the experts too: what a later token chooses is its own affair."""
    model, tokens_T = built(attention, kv, MOE), random_tokens(T)
    before_TP = run(model, tokens_T, [T])
    tokens_T[6] = (tokens_T[6] + 1) % 23
    after_TP = run(model, tokens_T, [T])
    close(after_TP[:6], before_TP[:6])
    assert (after_TP[6] - before_TP[6]).abs().max() > 1e-3


@pytest.mark.parametrize(("attention", "kv"), ALL)
def test_prefill_chunks_and_decode_agree(attention, kv):
    model, tokens_T = built(attention, kv, MOE), random_tokens(T)
    whole_TP = run(model, tokens_T, [T])
    for sizes in ([T], [1] * T, [3] * 4, [5, 1, 1, 2], [7, 4]):
        close(chunked(model, tokens_T, sizes), whole_TP)


@pytest.mark.parametrize(("attention", "kv"), ALL)
def test_packed_sequences_equal_separate_ones(attention, kv):
    lengths = [5, 1, 0, 9, 9, 2]
    model, tokens_T = built(attention, kv, MOE), random_tokens(sum(lengths))
    packed_TP = run(model, tokens_T, lengths)
    separate = [run(model, piece, [len(piece)]) for piece in tokens_T.split(lengths) if len(piece)]
    close(packed_TP, torch.cat(separate))


@pytest.mark.parametrize(("attention", "kv"), ALL)
def test_no_bit_of_a_document_reaches_the_next(attention, kv):
    """Dense layers, whose shapes do not depend on the data: not one bit may move."""
    lengths = [7, 6, 4]
    model, tokens_T = built(attention, kv, DENSE), random_tokens(17)
    before_TP = run(model, tokens_T, lengths)
    tokens_T[:7] = random_tokens(7, seed=1)
    after_TP = run(model, tokens_T, lengths)
    assert torch.equal(after_TP[7:], before_TP[7:])
    assert not torch.equal(after_TP[:7], before_TP[:7])


@pytest.mark.parametrize(("attention", "kv"), ALL)
def test_ragged_batch_in_one_memory(attention, kv):
    """Prompts of different lengths, a step in which one sequence waits, a chunk beside a single token."""
    model, totals = built(attention, kv, MOE), [9, 4, 12]
    sequences = [random_tokens(total, seed=i) for i, total in enumerate(totals)]
    memory, got = model.memory(3), [[], [], []]
    for lengths in ([5, 1, 7], [1, 1, 1], [1, 0, 1], [0, 1, 0], [2, 1, 3]):
        starts = list(memory.lengths)
        pieces = [x[a : a + n] for x, a, n in zip(sequences, starts, lengths, strict=True)]
        logits_TP = run(model, torch.cat(pieces), lengths, memory)
        for rows, piece in zip(got, logits_TP.split(lengths), strict=True):
            rows.append(piece)
    assert memory.lengths == totals
    for rows, sequence in zip(got, sequences, strict=True):
        close(torch.cat(rows), run(model, sequence, [len(sequence)]))


@pytest.mark.parametrize(("attention", "kv"), ALL)
def test_one_token(attention, kv):
    model, token_T = built(attention, kv, MOE), random_tokens(1)
    want_TP = run(model, token_T, [1])
    assert want_TP.isfinite().all()
    close(run(model, token_T, [1], model.memory(1)), want_TP)


@pytest.mark.parametrize(("attention", "kv"), EVERY_PATTERN)
def test_late_positions(attention, kv):
    """A wrong angle cannot be seen at position 0: decode 3 steps after 1000 tokens, and shift a whole stream."""
    model, tokens_T = built(attention, kv, DENSE, 1), random_tokens(1003)
    whole_TP = run(model, tokens_T, [1003])
    close(chunked(model, tokens_T, [1000, 1, 1, 1])[-3:], whole_TP[-3:], 1e-10)
    stream = Stream.of_lengths([T])
    late = Stream(stream.positions_T + 1000, stream.cu_seqlens, stream.max_len, stream.rows)
    with torch.no_grad():
        late_TP = model.logits(model(tokens_T[:T], late).hidden_TD)
    close(late_TP, run(model, tokens_T[:T], [T]), 1e-9)


@pytest.mark.parametrize(("attention", "kv"), EVERY_PATTERN)
def test_equal_rows_equal_ragged_rows(attention, kv):
    """The batched path of equal lengths and the path over runs give what one sequence at a time gives."""
    model, tokens_T = built(attention, kv, MOE), random_tokens(27)
    stream = Stream.of_lengths([9, 9, 9])
    assert stream.rows == 3
    as_ragged = Stream(stream.positions_T, stream.cu_seqlens, stream.max_len, None)
    with torch.no_grad():
        ragged_TP = model.logits(model(tokens_T, as_ragged).hidden_TD)
    close(run(model, tokens_T, [9, 9, 9]), ragged_TP)
    close(ragged_TP, torch.cat([run(model, piece, [9]) for piece in tokens_T.split(9)]))


@pytest.mark.parametrize(("attention", "kv"), EVERY_PATTERN)
def test_batch_order_does_not_matter(attention, kv):
    model, lengths = built(attention, kv, MOE), [4, 7, 5]
    pieces = list(random_tokens(16).split(lengths))
    logits = run(model, torch.cat(pieces), lengths).split(lengths)
    turned = run(model, torch.cat(pieces[::-1]), lengths[::-1]).split(lengths[::-1])
    for got, want in zip(turned[::-1], logits, strict=True):
        close(got, want)


@pytest.mark.parametrize("window", [T, T + 1, 64])
def test_window_that_covers_the_sequence_is_full_attention(window):
    full, local, tokens_T = built(Full()), built(Window(window=window)), random_tokens(T)
    close(run(local, tokens_T, [T]), run(full, tokens_T, [T]))


def test_smaller_windows_differ_from_full_attention():
    """The equality above is not an accident of a model that ignores its context."""
    full, local, tokens_T = built(Full()), built(Window(window=4)), random_tokens(T)
    difference_T = (run(local, tokens_T, [T]) - run(full, tokens_T, [T])).abs().amax(-1)
    assert difference_T[:4].max() < 1e-11
    assert difference_T[4:].min() > 1e-4


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 3, 4])
def test_reach_of_stacked_windows(layers, window):
    """Token s reaches t in [s, s + n (W - 1)] and no further."""
    model, tokens_T, s = built(Window(window=window), layers=layers), random_tokens(24), 5
    before_TP = run(model, tokens_T, [24])
    tokens_T[s] = (tokens_T[s] + 1) % 23
    changed_T = (run(model, tokens_T, [24]) != before_TP).any(-1)
    last = s + layers * (window - 1)
    assert changed_T.nonzero()[:, 0].tolist() == list(range(s, last + 1))


@pytest.mark.parametrize(("attention", "kv"), EVERY_STATE)
def test_state_bytes_as_declared(attention, kv):
    """Rows in use = the declaration = the budget, at every length."""
    model = built(attention, kv, DENSE, 1)
    memory, tokens_T = model.memory(2), random_tokens(14)
    spec = model.spec.states()[0]
    for step in range(7):
        run(model, tokens_T[:2], [1, 1], memory)
        declared = spec.nbytes(step + 1, itemsize=8)
        assert memory.nbytes == 2 * declared
        assert model.spec.cost(At(step + 1, itemsize=8)).state_bytes == declared


@pytest.mark.parametrize("attention", params(examples(ATTENTION)))
@pytest.mark.parametrize("chunk", [1, 7])
def test_buffers_stay_within_their_slack(attention, chunk):
    """A ring stops growing at twice its window; a growing state has at most half as much again as it needs, or 256."""
    spec = attention.state(groups=2, k_dim=8, v_dim=8)
    memory = Memory([spec], batch=1, dtype=torch.float32)
    state, tokens = memory.layers[0], 0
    while tokens < 2100:
        stream = Stream.of_lengths([chunk], memory=memory)
        state.append(torch.randn(chunk, 2, 8), torch.randn(chunk, 2, 8), stream)
        memory.commit(stream)
        tokens += chunk
        assert spec.rows(tokens) <= state.held[0] <= state.k.shape[2]
        slack = (spec.window or 0) + chunk if spec.kind == "ring" else max(256, tokens // 2)
        assert state.k.shape[2] <= (spec.window or tokens) + spec.sinks + slack


def test_a_rolling_state_remembers_the_right_rows():
    """After thousands of tokens the ring still holds exactly the sinks and the last window, under their positions."""
    spec = Window(window=3, sinks=2).state(groups=1, k_dim=1, v_dim=1)
    memory = Memory([spec], batch=1, dtype=torch.float64)
    for token in range(2000):
        stream = Stream.of_lengths([1], memory=memory)
        row_TGK = torch.tensor([[[float(token)]]], dtype=torch.float64)
        keys = memory.layers[0].append(row_TGK, -row_TGK, stream)
        memory.commit(stream)
        if keys.positions is None:
            assert token == 0  # the first step reads its own rows
            continue
        held: Tensor = keys.positions[0]
        assert keys.k[0, 0, :, 0].tolist() == held.tolist() == (-keys.v[0, 0, :, 0]).tolist()
        assert set(held.tolist()) >= {*range(max(0, token - 2), token + 1), *range(min(2, token + 1))}
