"""The gated delta rule: definition and chunks agree, forward and backward, wherever a sequence is cut (LA-1,
LA-3, LA-4 and LA-12 of spec minimax-01, section 3.10, for the delta family), and it does what a memory should.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import close
from torch import Tensor

from sextant.kernels.linear.delta import chunked_delta, delta_rule, recurrent_delta

B, H, K, V = 2, 3, 5, 4
FORMS = ["head", "channel"]


def case(form: str, tokens: int, dtype=torch.float64, strongest: float = 0.9) -> tuple[Tensor, ...]:
    """q, unit k, v, log decays, betas over 0 to 1, and a state that is not zero."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, tokens, width, dtype=dtype) for width in (K, K, V))
    log = -strongest * torch.rand(B, H, tokens, 1 if form == "head" else K, dtype=dtype)
    beta_BHT, state_BHKV = torch.rand(B, H, tokens, dtype=dtype), torch.randn(B, H, K, V, dtype=dtype)
    return q, k / k.norm(dim=-1, keepdim=True), v, log, beta_BHT, state_BHKV


def equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...], tolerance: float = 1e-12) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


def gradients(forward: Callable[..., tuple[Tensor, ...]], rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of all rows, for a loss that weighs outputs and final state unalike."""
    leaves = [x.clone().requires_grad_() for x in rows]
    torch.manual_seed(1)
    loss = sum((torch.randn_like(x) * x.tanh()).sum() for x in forward(*leaves))
    return torch.autograd.grad(loss, leaves)  # type: ignore[arg-type]


def of_door(rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Rows as the public function takes them, tokens before heads."""
    return (*(x.transpose(1, 2) for x in rows[:-1]), rows[-1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [2, 3])
def test_recurrence_by_matrices(form, tokens):
    """The formula with its matrices, for each sequence and head."""
    q, k, v, log, beta, state = case(form, tokens)
    o_BHTV, after_BHKV = recurrent_delta(q, k, v, log, beta, state)
    for b in range(B):
        for h in range(H):
            now = state[b, h]
            for t in range(tokens):
                key, decay = k[b, h, t], torch.diag(log[b, h, t].exp().expand(K))
                erase = torch.eye(K, dtype=now.dtype) - beta[b, h, t] * torch.outer(key, key)
                now = erase @ decay @ now + beta[b, h, t] * torch.outer(key, v[b, h, t])
                close(o_BHTV[b, h, t], q[b, h, t] @ now)
            close(after_BHKV[b, h], now)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 2, 33, 100])
def test_chunks_equal_the_recurrence(form, tokens):
    """Chunks of 1, 7, 16, 64 tokens, and more than there are."""
    rows = case(form, tokens)
    want = recurrent_delta(*rows)
    for chunk in (1, 7, 16, 64, 256):
        equal(chunked_delta(*rows, chunk), want)
        got_BTHV, after = delta_rule(*of_door(rows), chunk)
        equal((got_BTHV.transpose(1, 2), after), want)


@pytest.mark.parametrize("form", FORMS)
def test_in_fp32(form):
    rows = case(form, 300)
    want = recurrent_delta(*rows)
    single = tuple(x.float() for x in rows)
    for got in (recurrent_delta(*single), *(chunked_delta(*single, chunk) for chunk in (7, 64, 256))):
        equal(tuple(x.double() for x in got), want, 2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_in_fp32_with_one_key_for_all_tokens(form):
    """The worst system: every token overlaps with every other, nothing is forgotten, corrections are whole."""
    q, k, v, log, beta, state = case(form, 128)
    rows = q, k[:, :, :1].expand_as(k), v, 0 * log, beta.clamp_min(1), state
    got = chunked_delta(*(x.float() for x in rows), 64)
    equal(tuple(x.double() for x in got), recurrent_delta(*rows), 1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_split_anywhere(form):
    tokens = 21
    *rows, state = case(form, tokens)
    whole = chunked_delta(*rows, state, 4)
    for at in range(tokens + 1):
        now, pieces = state, []
        for here in (slice(0, at), slice(at, tokens)):
            o, now = chunked_delta(*(x[:, :, here] for x in rows), now, 4)
            pieces.append(o)
        equal((torch.cat(pieces, dim=2), now), whole)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 3, 4, 16])
def test_gradients_equal_those_of_the_recurrence(form, chunk):
    """Of q, k, v, decays, betas and the initial state; also through the door, which computes the chunks again."""
    rows = case(form, 13)
    want = gradients(recurrent_delta, rows)
    equal(gradients(lambda *x: chunked_delta(*x, chunk), rows), want, 1e-11)

    def door(*x: Tensor) -> tuple[Tensor, ...]:
        o_BTHV, after = delta_rule(*of_door(x), chunk)
        return o_BTHV.transpose(1, 2), after

    equal(gradients(door, rows), want, 1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    rows = of_door(case(form, 5))
    leaves = [x[:1, :, :2] for x in rows[:-1]] + [rows[-1][:1, :2]]
    leaves = [x.clone().requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(lambda *x: delta_rule(*x, 2), leaves)


@pytest.mark.parametrize("form", FORMS)
def test_key_heads_serve_neighbouring_value_heads(form):
    """2 heads of keys for 6 of values: as if each key head stood three times; gradients add up."""
    _, _, v, log, beta, state = (torch.cat((x, x.flip(1)), dim=1) for x in case(form, 11))
    q, k = (x[:, :2].clone().requires_grad_() for x in case(form, 11)[:2])
    wide = [x.repeat_interleave(3, dim=1) for x in (q, k)]
    want = recurrent_delta(*wide, v, log, beta, state)[0].transpose(1, 2)
    got, _ = delta_rule(*of_door((q, k, v, log, beta, state)), 4)
    close(got, want)
    for a, b in zip(*(torch.autograd.grad(o.tanh().sum(), (q, k)) for o in (got, want)), strict=True):
        close(a, b)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("key_scale", [0.0, 0.5])
def test_beta_0_is_decay_alone(form, key_scale):
    """Nothing is written and nothing corrected, whatever the keys."""
    q, k, v, log, beta, state = case(form, 9)
    _, after = chunked_delta(q, key_scale * k, v, log, 0 * beta, state, 4)
    close(after, log.sum(2).exp()[..., None] * state)


@pytest.mark.parametrize("form", FORMS)
def test_no_decay_is_the_delta_rule(form):
    """With log decays 0, one step is one step of gradient descent on ``|k S - v|^2 / 2`` with rate beta."""
    q, k, v, log, beta, state = (x[:, :, :1] if i < 5 else x for i, x in enumerate(case(form, 3)))
    held = state.clone().requires_grad_()
    loss = (k @ held - v).square().sum() / 2
    want = state - beta[..., None] * torch.autograd.grad(loss, held)[0]
    close(chunked_delta(q, k, v, 0 * log, beta, state, 4)[1], want)


@pytest.mark.parametrize("form", FORMS)
def test_whole_decay_leaves_the_last_token(form):
    """exp(-200) of the past is nothing: every output is the token's own, and gradients are finite."""
    q, k, v, log, beta, state = case(form, 70)
    gone = torch.full_like(log, -200.0)
    own_BHTV = (q * k).sum(-1, keepdim=True) * beta[..., None] * v
    close(chunked_delta(q, k, v, gone, beta, state, 16)[0], own_BHTV)
    found = gradients(lambda *x: chunked_delta(*x, 64), tuple(x.float() for x in (q, k, v, gone, beta, state)))
    assert all(gradient.isfinite().all() for gradient in found)


@pytest.mark.parametrize("form", FORMS)
def test_strong_decays_in_fp32(form):
    """exp(30 * 64) is beyond every dtype; a form that pulls the decays apart would give inf or nan (spec 3.3)."""
    rows = case(form, 130, strongest=30.0)
    got = chunked_delta(*(x.float() for x in rows), 64)
    equal(tuple(x.double() for x in got), recurrent_delta(*rows), 1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_orthonormal_keys_are_recalled_exactly(form):
    """Written once with beta 1 and no decay, each key gives its value back; written again, the newer one."""
    q, _, v, log, beta, state = case(form, 2 * K)
    basis = torch.linalg.qr(torch.randn(B, H, K, K, dtype=q.dtype))[0]
    k = torch.cat((basis, basis), dim=2)
    once = slice(0, K)
    rows = q[:, :, once], k[:, :, once], v[:, :, once], 0 * log[:, :, once], 0 * beta[:, :, once] + 1, state
    _, after = chunked_delta(*rows, 3)
    close(basis @ after, v[:, :, once])
    _, after = chunked_delta(q, k, v, 0 * log, 0 * beta + 1, state, 3)
    close(basis @ after, v[:, :, K:])


@pytest.mark.parametrize("form", FORMS)
def test_causality_is_exact(form):
    """Outputs before a changed token keep every bit; its own and later ones move."""
    q, k, v, log, beta, state = case(form, 20)
    before, _ = chunked_delta(q, k, v, log, beta, state, 8)
    k, v, log, beta = (x.clone() for x in (k, v, log, beta))
    k[:, :, 11], v[:, :, 11], log[:, :, 11], beta[:, :, 11] = 0.3, -2.0, -1.5, 0.9
    after, _ = chunked_delta(q, k, v, log, beta, state, 8)
    assert torch.equal(before[:, :, :11], after[:, :, :11])
    assert (before[:, :, 11:] != after[:, :, 11:]).any(-1).all()


@pytest.mark.parametrize("form", FORMS)
def test_the_door_takes_half_precision_and_answers_in_fp32(form):
    *rows, _ = of_door(case(form, 70))
    half = [x.bfloat16() for x in rows]
    o_BTHV, state = delta_rule(*half, None, 16)
    assert o_BTHV.dtype == state.dtype == torch.float32
    equal((o_BTHV.double(), state.double()), delta_rule(*(x.double() for x in half), None, 16), 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_memory_kept_for_backward_is_the_inputs(form):
    """Nothing of size T x chunk, and no state per chunk."""

    def kept(tokens: int) -> int:
        *rows, _ = of_door(case(form, tokens, torch.float32))
        found: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            delta_rule(*(x.requires_grad_() for x in rows), None, 16)
        return sum(found.values())

    per_token = 4 * B * H * (2 * K + V + 1 + (K if form == "channel" else 1))
    assert kept(64) <= 64 * per_token + 1024
    assert kept(256) <= 256 * per_token + 1024


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens(form):
    rows = of_door(case(form, 0))
    o_BTHV, after = delta_rule(*(x.requires_grad_() for x in rows), 4)
    assert o_BTHV.shape == (B, 0, H, V) and torch.equal(after, rows[-1])
