"""Attention x KV x position, every example of every row: causal, ragged, and the same however it is fed.

The contract: prefill = chunked prefill = step-by-step decode = packed with neighbours, and documents never see each
other. Run in fp64, where 1e-11 leaves no room for a wrong key.
"""

import copy

import pytest
import torch
from cases import DENSE, MOE, PLAIN, built, chunked, close, combinations, params, random_tokens, run
from torch import Tensor

from sextant.axes.attention import Full, Window
from sextant.axes.kv import GQA, NoPE
from sextant.core.cost import At
from sextant.core.state import Memory, RowSpec
from sextant.core.stream import Stream

ALL = params(combinations())
EVERY_PATTERN = params((attention, kv) for attention, kv in combinations() if kv in (PLAIN, None))
T = 11


def gradients(model, tokens_T: Tensor, lengths: list[int]) -> dict[str, Tensor]:
    """Of every parameter, for a loss in which no two rows weigh alike."""
    model.zero_grad()
    hidden_TD = model(tokens_T, Stream.of_lengths(lengths)).hidden_TD
    weights_T = 1 + tokens_T.to(hidden_TD.dtype)
    (model.logits(hidden_TD).square().sum(-1) * weights_T).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


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


@pytest.mark.parametrize(("attention", "kv"), ALL)
def test_rolled_back_tokens_were_never_there(attention, kv):
    """Wrong tokens fed, one by one and as a chunk, and taken back; then the right ones, as in speculation."""
    model, tokens_T = built(attention, kv, MOE), random_tokens(20)
    whole_TP, wrong_T = run(model, tokens_T, [20]), random_tokens(20, seed=9)
    memory, pieces, at = model.memory(1, undo=4), [], 0
    for good, bad in ((5, [4]), (1, [1, 2]), (3, [3]), (6, [1]), (2, [2, 1, 1]), (3, [])):
        pieces.append(run(model, tokens_T[at : at + good], [good], memory))
        at += good
        for count in bad:
            run(model, wrong_T[:count], [count], memory)
        memory.rollback(sum(bad))
        assert memory.lengths == [at]
    close(torch.cat(pieces), whole_TP)


@pytest.mark.parametrize(("attention", "kv"), ALL)
def test_one_sequence_of_a_batch_rolls_back(attention, kv):
    model, a_T, b_T = built(attention, kv, MOE), random_tokens(12), random_tokens(12, seed=1)
    memory = model.memory(2, undo=3)
    run(model, torch.cat([a_T[:7], b_T[:5]]), [7, 5], memory)
    run(model, torch.cat([a_T[7:10], b_T[5:8]]), [3, 3], memory)
    memory.rollback([2, 0])
    logits_TP = run(model, torch.cat([a_T[8:], b_T[8:]]), [4, 4], memory)
    close(logits_TP[:4], run(model, a_T, [12])[8:])
    close(logits_TP[4:], run(model, b_T, [12])[8:])


@pytest.mark.parametrize(("attention", "kv"), ALL)
def test_forks_share_a_prefix_and_nothing_else(attention, kv):
    """Two answers to one prompt in one memory, and a memory forked off; none sees the others."""
    model, prompt_T = built(attention, kv, MOE), random_tokens(7)
    answers = [random_tokens(5, seed=seed) for seed in (1, 2, 3)]
    wants = [run(model, torch.cat([prompt_T, answer]), [12])[7:] for answer in answers]
    memory = model.memory(1)
    run(model, prompt_T, [7], memory)
    other = memory.fork()
    memory.keep([0, 0])
    close(chunked(model, answers[2], [2, 1, 2], other), wants[2])
    for step in range(5):
        logits_TP = run(model, torch.stack([answers[0][step], answers[1][step]]), [1, 1], memory)
        close(logits_TP, torch.stack([wants[0][step], wants[1][step]]))


@pytest.mark.parametrize(("attention", "kv"), EVERY_PATTERN)
def test_gradients_equal_those_of_packed_pieces(attention, kv):
    """Backward through packing: the gradient of a packed batch is the sum of its documents', and fp32 is near fp64."""
    lengths = [9, 1, 14]
    model, tokens_T = copy.deepcopy(built(attention, kv, DENSE)), random_tokens(24)
    whole = gradients(model, tokens_T, lengths)
    pieces = [gradients(model, piece, [len(piece)]) for piece in tokens_T.split(lengths)]
    for name, gradient in whole.items():
        close(gradient, sum(piece[name] for piece in pieces), 1e-9)
        assert gradient.isfinite().all(), name
    single = gradients(model.float(), tokens_T, lengths)
    peaks = {name: gradient.abs().max().item() for name, gradient in whole.items()}
    noise = 1e-6 * max(peaks.values())  # of a gradient that is exactly 0, as that of a query that reads one key
    for name, gradient in whole.items():
        torch.testing.assert_close(single[name].double(), gradient, rtol=1e-3, atol=max(1e-4 * peaks[name], noise))


@pytest.mark.parametrize(("attention", "kv"), ALL)
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


@pytest.mark.parametrize("spec", [RowSpec(2, 8, 8), RowSpec(2, 8, 8, 4), RowSpec(2, 8, 8, 3, 2), RowSpec(1, 8, 0, 64)])
@pytest.mark.parametrize("chunk", [1, 7])
def test_buffers_stay_within_their_slack(spec, chunk):
    """A ring stops growing at twice its window; a growing state has at most half as much again as it needs, or 256."""
    memory = Memory([spec], batch=1, dtype=torch.float32)
    state, tokens = memory.layers[0], 0
    while tokens < 2100:
        stream = Stream.of_lengths([chunk], memory=memory)
        state.append(torch.randn(chunk, spec.heads, 8), torch.randn(chunk, spec.heads, spec.v_dim), stream)
        memory.commit(stream)
        tokens += chunk
        assert spec.rows(tokens) <= state.held[0] <= state.k.shape[2]
        slack = (spec.window or 0) + chunk if spec.kind == "ring" else max(256, tokens // 2)
        assert state.k.shape[2] <= (spec.window or tokens) + spec.sinks + slack


def test_a_rolling_state_remembers_the_right_rows():
    """After thousands of tokens the ring still holds exactly the sinks and the last window, under their positions."""
    spec = Window(window=3, sinks=2).state(GQA(heads=1, kv_heads=1, head_dim=1, position=NoPE()))
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
