"""Linear attention: definition, recurrence and chunks agree, forward and backward, wherever a sequence is cut.

The ids LA-1 to LA-12 are those of spec minimax-01, section 3.10.
"""

import math

import pytest
import torch
from cases import close
from torch import Tensor

from sextant.kernels.linear import chunked, linear_attention, parallel, recurrent

B, H, K, V = 2, 3, 5, 4
FORMS = ["head", "token", "channel"]


def log_decay(form: str, tokens: int, dtype=torch.float64, strongest: float = 0.917) -> Tensor:
    """At most 0, of every form; the fastest head forgets more than half per token."""
    if form == "head":
        return -strongest * torch.rand(1, H, 1, 1, dtype=dtype)
    return -strongest * torch.rand(B, H, tokens, 1 if form == "token" else K, dtype=dtype)


def case(form: str, tokens: int, dtype=torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, v, log decays and a state that is not zero."""
    torch.manual_seed(seed)
    q, k, v = (torch.randn(B, H, tokens, width, dtype=dtype) for width in (K, K, V))
    return q, k, v, log_decay(form, tokens, dtype), torch.randn(B, H, K, V, dtype=dtype)


def equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...], tolerance: float = 1e-12) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


def cut(log: Tensor, here: slice) -> Tensor:
    return log if log.shape[2] == 1 else log[:, :, here]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 2, 33, 100])
def test_la_1_three_forms_agree(form, tokens):
    """Chunks of 1, 7, 16, 64 and 256 tokens; also more than there are (LA-2)."""
    rows = case(form, tokens)
    want = recurrent(*rows)
    equal(parallel(*rows), want)
    for chunk in (1, 7, 16, 64, 256):
        equal(chunked(*rows, chunk), want)


@pytest.mark.parametrize("form", FORMS)
def test_la_1_in_fp32(form):
    rows = case(form, 300)
    want = recurrent(*rows)
    single = tuple(x.float() for x in rows)
    for got in (recurrent(*single), *(chunked(*single, chunk) for chunk in (7, 64, 256))):
        equal(tuple(x.double() for x in got), want, 1e-5)


def test_the_oracle_is_not_blind():
    """A decay that is off by one token, or left out, moves the result far beyond the tolerance."""
    q, k, v, log, state = case("head", 33)
    o_BHTV, after = recurrent(q, k, v, log, state)
    for wrong in (recurrent(q, k, v, log, state * log.exp()), recurrent(q, k, v, 0 * log, state)):
        assert (wrong[0] - o_BHTV).abs().max() > 0.01 and (wrong[1] - after).abs().max() > 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_la_3_split_anywhere(form):
    tokens = 21
    q, k, v, log, state = case(form, tokens)
    whole = chunked(q, k, v, log, state, 4)
    for at in range(tokens + 1):
        now, pieces = state, []
        for here in (slice(0, at), slice(at, tokens)):
            o, now = chunked(q[:, :, here], k[:, :, here], v[:, :, here], cut(log, here), now, 4)
            pieces.append(o)
        equal((torch.cat(pieces, dim=2), now), whole)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 3, 4, 16])
def test_la_4_gradients_equal_those_of_the_parallel_form(form, chunk):
    """Of q, k, v, the decays and the initial state, for a loss that weighs outputs and final state unalike."""
    rows = case(form, 13)
    weights = [torch.randn_like(x) for x in parallel(*rows)]

    def gradients(forward) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in rows]
        loss = sum((w * x.tanh()).sum() for w, x in zip(weights, forward(*leaves), strict=True))
        return torch.autograd.grad(loss, leaves)  # type: ignore[arg-type]

    equal(gradients(lambda *x: chunked(*x, chunk)), gradients(parallel), 1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_la_4_gradcheck(form):
    """Through the public door, which computes the chunks again in the backward."""
    q, k, v, log, state = (x[:1, :2, ..., :3] for x in case(form, 5))
    log = log[0, :, 0, 0] if form == "head" else log.transpose(1, 2)
    leaves = [x.clone().requires_grad_() for x in (*(x.transpose(1, 2) for x in (q, k, v)), log, state[:, :, :3])]
    assert torch.autograd.gradcheck(lambda *rows: linear_attention(*rows, 2), leaves)


@pytest.mark.parametrize("form", ["token", "channel"])
def test_la_6_tokens_without_key_and_decay_leave_the_state(form):
    """What padding would have to be: no key, no decay. A fixed decay cannot be switched off, so nothing is padded."""
    q, k, v, log, state = case(form, 9)
    o, after = chunked(q, k, v, log, state, 4)
    q, k, v, log = (torch.nn.functional.pad(x, (0, 0, 0, 3)) for x in (q, k, v, log))
    o_padded, after_padded = chunked(q, k, v, log, state, 4)
    equal((o_padded[:, :, :9], after_padded), (o, after))


@pytest.mark.parametrize("chunk", [1, 2])
def test_la_7_two_tokens_across_an_edge(chunk):
    """q = k = v = 1: the second output is 1 + decay, and the state is the true one, not decayed for a third token."""
    one, log = torch.ones(1, 1, 2, 1, dtype=torch.float64), torch.full((1, 1, 1, 1), math.log(0.25))
    o_BHTV, state = chunked(one, one, one, log.double(), one.new_zeros(1, 1, 1, 1), chunk)
    close(o_BHTV.flatten(), torch.tensor([1.0, 1.25], dtype=torch.float64), 1e-7)
    close(state.flatten(), torch.tensor([1.25], dtype=torch.float64), 1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_la_12_causality_is_exact(form):
    """Outputs before a changed token keep every bit; its own and later ones move."""
    q, k, v, log, state = case(form, 20)
    before, _ = chunked(q, k, v, log, state, 8)
    k, v = k.clone(), v.clone()
    k[:, :, 11], v[:, :, 11] = 3.0, -2.0
    after, _ = chunked(q, k, v, log, state, 8)
    assert torch.equal(before[:, :, :11], after[:, :, :11])
    assert (before[:, :, 11:] != after[:, :, 11:]).any(-1).all()


@pytest.mark.parametrize("form", FORMS)
def test_strong_decays_neither_overflow_nor_lose_gradients(form):
    """exp(30 * 64) is beyond every dtype; a form that pulls the decays apart would give inf or nan (spec 3.3)."""
    q, k, v, _, state = case(form, 130, torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v, log_decay(form, 130, torch.float32, 30.0), state)]
    o_BHTV, after = chunked(*leaves, 64)
    want_o, want_after = recurrent(*(x.detach().double() for x in leaves))
    equal((o_BHTV.double(), after.double()), (want_o, want_after), 1e-5)
    gradients = torch.autograd.grad(o_BHTV.square().sum() + after.square().sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("form", FORMS)
def test_the_door_takes_half_precision_and_answers_in_fp32(form):
    q, k, v, log, _ = case(form, 70)
    log = log[0, :, 0, 0].float() if form == "head" else log.transpose(1, 2).float()
    rows = [x.transpose(1, 2).bfloat16() for x in (q, k, v)]
    o_BTHV, state = linear_attention(*rows, log, None, 16)
    assert o_BTHV.dtype == state.dtype == torch.float32
    want = linear_attention(*(x.double() for x in rows), log.double(), None, 16)
    equal((o_BTHV.double(), state.double()), want, 1e-5)


@pytest.mark.parametrize("form", ["head", "channel"])
def test_memory_kept_for_backward_is_the_inputs(form):
    """Nothing of size T x chunk or per chunk: 4 times the tokens keep 4 times the bytes, those of the inputs."""

    def kept(tokens: int) -> int:
        q, k, v, log, _ = case(form, tokens, torch.float32)
        log = log[0, :, 0, 0] if form == "head" else log.transpose(1, 2)
        leaves = [x.transpose(1, 2).requires_grad_() for x in (q, k, v)]
        found: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            linear_attention(*leaves, log, None, 16)
        return sum(found.values())

    per_token = 4 * B * H * (2 * K + V + (K if form == "channel" else 0))
    assert kept(64) <= 64 * per_token + 1024
    assert kept(256) <= 256 * per_token + 1024


def test_no_tokens():
    q, k, v, log, state = case("head", 0)
    o_BHTV, after = chunked(q, k, v, log, state, 4)
    assert o_BHTV.shape == (B, H, 0, V) and torch.equal(after, state)
