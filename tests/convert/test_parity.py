"""Ours against transformers in fp32: logits, every gradient, packing, decoding, and balance losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from oracle_hf import CASES, Pair, gap, gradients_on_disk, make_pair, tokens
from torch import Tensor

from sextant.axes.kv.position import Rotary
from sextant.axes.routing import Auxiliary
from sextant.convert import import_weights, spec_from_hf, to_disk
from sextant.core.stream import Stream
from sextant.train.loss import Balance

CLOSE = 1e-5


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory) -> Pair:
    return make_pair(CASES[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Pair:
    return make_pair(CASES["mixtral"], tmp_path_factory.mktemp("mixtral"))


def cross_entropy(logits_BTP: Tensor, tokens_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTP[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())


def rotaries(pair: Pair) -> Iterator[tuple[Rotary, str]]:
    """Our rotary code of each layer, and what theirs is called in their rotary module."""
    for layer, block in zip(pair.ours.spec.layers, pair.ours.blocks, strict=True):
        kind = "full_attention_" if layer.attention.kind == "full" else "sliding_attention_"
        yield block.attention.kv.position, kind if pair.case.family == "gemma3_text" else ""


def share_frequencies(pair: Pair) -> None:
    """Give theirs our rotary frequencies, which :func:`test_rotary_frequencies` compares.

    Theirs are rounded to fp32 after every operation, ours once. At position 127 the difference alone is worth 1e-5 in
    the logits, and would hide other differences of this size.
    """
    for rotary, prefix in rotaries(pair):
        getattr(pair.theirs.base_model.rotary_emb, f"{prefix}inv_freq").copy_(torch.tensor(rotary.frequencies))


def test_rotary_frequencies(pair: Pair, tmp_path):
    untouched = make_pair(pair.case, tmp_path)
    theirs = untouched.theirs.base_model.rotary_emb
    for rotary, prefix in rotaries(untouched):
        frequencies = torch.tensor(rotary.frequencies, dtype=torch.float64)
        torch.testing.assert_close(getattr(theirs, f"{prefix}inv_freq").double(), frequencies, rtol=3e-7, atol=0)
        assert rotary.magnitude == pytest.approx(getattr(theirs, f"{prefix}attention_scaling"), rel=1e-9)


def test_logits_as_they_come(pair: Pair, tmp_path):
    """Nothing shared; three times the tolerance, for the rounding of their frequencies."""
    untouched, tokens_BT = make_pair(pair.case, tmp_path), tokens(1, pair.case.length)
    with torch.no_grad():
        assert gap(untouched.ours.batch_logits(tokens_BT), untouched.theirs(tokens_BT).logits) < 3 * CLOSE


@pytest.mark.parametrize("batch, shorter", [(1, 0), (2, 0), (2, 30)])
def test_logits_and_gradients(pair: Pair, batch: int, shorter: int, tmp_path):
    share_frequencies(pair)
    tokens_BT = tokens(batch, pair.case.length - shorter, seed=batch)
    theirs, ours = pair.theirs(tokens_BT).logits, pair.ours.batch_logits(tokens_BT)
    assert gap(ours, theirs) < CLOSE
    assert gap(ours[:, -5:], theirs[:, -5:]) < CLOSE  # a wrong scale or rotation grows with the position

    pair.theirs.zero_grad()
    pair.ours.zero_grad()
    cross_entropy(theirs, tokens_BT).backward()
    cross_entropy(ours, tokens_BT).backward()
    expected = gradients_on_disk(pair.theirs, tmp_path)
    got = to_disk({name: p.grad for name, p in pair.ours.named_parameters() if p.grad is not None}, pair.case.family)
    assert got.keys() == expected.keys()
    gaps = {name: gap(got[name], expected[name]) for name in expected}
    assert max(gaps.values()) < CLOSE, max(gaps.items(), key=lambda item: item[1])


def test_packed_documents_equal_separate_ones(pair: Pair):
    share_frequencies(pair)
    lengths = [pair.case.length - 4, 1, 13, 23, 23]
    tokens_T = tokens(sum(lengths))
    with torch.no_grad():
        ours_TP = pair.ours.logits(pair.ours(tokens_T, Stream.of_lengths(lengths)).hidden_TD)
        theirs_TP = torch.cat([pair.theirs(part[None]).logits[0] for part in tokens_T.split(lengths)])
    assert gap(ours_TP, theirs_TP) < CLOSE


@torch.no_grad()
def test_decoding_equals_their_full_forward(pair: Pair):
    """A prompt of 19 tokens, chunks of 5 and 3, then one token at a time, beyond every window, for two sequences."""
    share_frequencies(pair)
    tokens_BT = tokens(2, pair.case.length)
    memory, pieces = pair.ours.memory(2), []
    for chunk_BT in tokens_BT.split([19, 5, 3] + [1] * (pair.case.length - 27), dim=1):
        stream = Stream.of_lengths([chunk_BT.shape[1]] * 2, memory=memory)
        pieces.append(pair.ours.logits(pair.ours(chunk_BT.flatten(), stream).hidden_TD).unflatten(0, (2, -1)))
    assert gap(torch.cat(pieces, dim=1), pair.theirs(tokens_BT).logits) < CLOSE


MISTAKES = [
    ("mistral", "layers[*].attention.window=10"),
    ("mistral", "layers[*].attention.window=8"),
    ("llama", "layers[*].kv.position.layout=interleaved"),
    ("llama-yarn", "layers[*].kv.position.scaling.attention_factor=1.0"),
    ("llama-yarn", "layers[*].kv.position.scaling.original=128"),
    ("llama-llama3", "layers[*].kv.position.scaling.high_factor=3.5"),
    ("gemma3", "layers[5].kv.position.scaling.factor=7.0"),
    ("gemma3", "layers[0].kv.position.base=110.0"),
    ("gemma3", "layers[*].kv.scale=0.25"),
    ("gemma3", "embedding_scale=1.0"),
    ("gemma3", "softcap=30.0"),
    ("gemma3", "layers[*].feed_forward.activation=geglu"),
    ("mixtral", "layers[*].feed_forward.router.normalize=false"),
    ("olmoe", "layers[*].feed_forward.router.normalize=true"),
    ("olmoe", "layers[*].feed_forward.router.top_k=2"),
    ("qwen3-moe", "layers[0].feed_forward.router.normalize=false"),
    ("qwen3-moe-windows", "layers[*].attention.window=10"),
    ("dbrx", "layers[*].kv.clip=1.0"),
    ("dbrx", "layers[*].residual.norm.eps=0.01"),
    ("deepseek-v2", "layers[*].kv.position.scaling.mscale_all_dim=0.8"),
    ("deepseek-v2", "layers[1].feed_forward.router.normalize=true"),
    ("deepseek-v2-groups", "layers[1].feed_forward.router.groups.kept=3"),
    ("deepseek-v2-groups", "layers[1].feed_forward.router.scale=3.9"),
    ("deepseek-v2-lite", "layers[*].kv.position.layout=half"),
    ("deepseek-v3", "layers[*].kv.position.scaling.mscale_all_dim=null"),
    ("deepseek-v3", "layers[*].kv.norm.eps=0.001"),
    ("deepseek-v3", "layers[1].feed_forward.router.groups.score=max"),
    ("deepseek-v3", "layers[1].feed_forward.router.groups.kept=3"),
    ("deepseek-v3-one-group", "layers[1].feed_forward.router.normalize=true"),
    ("deepseek-v3-half", "layers[*].kv.position.layout=interleaved"),
    ("deepseek-v32", "layers[*].attention.top_k=6"),
    ("deepseek-v32", "layers[*].attention.rope_dim=6"),
]


@pytest.mark.parametrize("name, mistake", MISTAKES)
@torch.no_grad()
def test_a_wrong_declaration_is_seen(name: str, mistake: str, tmp_path):
    """The inputs above are strong enough: each small mistake moves the logits by far more than the tolerance."""
    pair = make_pair(CASES[name], tmp_path)
    wrong = pair.ours.spec.override(mistake).build()
    import_weights(wrong, pair.disk, pair.case.family)
    tokens_BT = tokens(1, pair.case.length)
    assert gap(wrong.batch_logits(tokens_BT), pair.theirs(tokens_BT).logits) > 10 * CLOSE


POOLED = {"mixtral": "mixtral", "olmoe": "olmoe", "qwen3-moe": "qwen3_moe", "dbrx": "dbrx"}
"""Cases whose classes have a balance loss, and where transformers keeps it."""


def their_balance(name: str) -> Callable[..., Tensor]:
    return import_module(f"transformers.models.{POOLED[name]}.modeling_{POOLED[name]}").load_balancing_loss_func


@pytest.mark.parametrize("name", POOLED)
def test_balance_loss_of_each_layer(name: str, tmp_path):
    """Theirs is ``top_k`` times ours: their shares of copies sum to ``top_k``, ours to 1. Gradients likewise."""
    pair = make_pair(CASES[name], tmp_path)
    tokens_T, stream = tokens(2 * 31), Stream.of_lengths([31, 31])
    routings = pair.ours(tokens_T, stream).routings
    assert len(routings) == sum(layer.feed_forward.kind == "experts" for layer in pair.ours.spec.layers)
    for layer, routing in routings.items():
        spec = pair.ours.spec.layers[layer].feed_forward
        ours = Auxiliary(coef=1.0).loss(routing, stream, routing.counts_E(), tokens_T.numel())
        logits_TE = routing.logits_TE.detach().requires_grad_()
        theirs = their_balance(name)((logits_TE,), spec.experts, spec.router.top_k)
        assert ours.item() * spec.router.top_k == pytest.approx(theirs.item(), rel=1e-6)
        assert not 0.99 < ours.item() < 1.01  # not balanced, so the formula matters
        (grad,) = torch.autograd.grad(ours, routing.logits_TE, retain_graph=True)
        (expected,) = torch.autograd.grad(theirs, logits_TE)
        assert gap(grad * spec.router.top_k, expected) < CLOSE


ONE_LAYER = {
    "mixtral": {"num_hidden_layers": 1}, "olmoe": {"num_hidden_layers": 1, "router_aux_loss_coef": 0.03},
    "qwen3-moe": {"num_hidden_layers": 1, "router_aux_loss_coef": 0.03}, "dbrx": {"n_layers": 1},
}


@pytest.mark.parametrize("name", ONE_LAYER)
def test_training_loss_with_balance(name: str, tmp_path):
    """With one layer nothing is pooled: the imported coefficient gives their whole training loss and its gradients."""
    case = replace(CASES[name], config=CASES[name].config | ONE_LAYER[name])
    pair = make_pair(case, tmp_path / "model")
    tokens_BT = tokens(2, 31)
    if name == "dbrx" and not pair.theirs(tokens_BT, output_router_logits=True).router_logits:
        pytest.skip("this version of transformers collects no router logits of DBRX, and its training loss fails")
    theirs = pair.theirs(tokens_BT, labels=tokens_BT, output_router_logits=True)
    stream = Stream.of_lengths([31, 31])
    out = pair.ours(tokens_BT.flatten(), stream)
    logits_BTP = pair.ours.logits(out.hidden_TD).unflatten(0, (2, 31))
    balance = Balance(pair.ours.spec).loss(out.routings, stream, tokens_BT.numel())
    ours = cross_entropy(logits_BTP, tokens_BT) + balance
    assert balance.item() > 0.05
    assert ours.item() == pytest.approx(theirs.loss.item(), rel=1e-6)

    ours.backward()
    theirs.loss.backward()
    expected = gradients_on_disk(pair.theirs, tmp_path / "gradients")
    got = to_disk({name: p.grad for name, p in pair.ours.named_parameters() if p.grad is not None}, case.family)
    assert max(gap(got[name], expected[name]) for name in expected) < CLOSE


def test_balance_coefficient_is_shared_among_layers(mixtral: Pair):
    """Theirs pools the layers into one loss, ours adds up one per layer."""
    (term,) = spec_from_hf(mixtral.config).layers[0].feed_forward.balance
    assert term.coef * len(mixtral.ours.blocks) == pytest.approx(0.03 * 2)
