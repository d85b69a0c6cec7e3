"""MiniMax-01 against transformers in fp32: the lightning layer, logits, gradients, packing, decoding, and its files.

Their class turns whole heads, so the pair has no ``rotary_dim``; partial rotation is held by ``tests/axes``.
"""

from __future__ import annotations

import pytest
import torch
from oracle_hf import BASE, Case, Pair, gap, gradients_on_disk, make_pair, tokens
from torch.nn import functional as F

from sextant.axes.attention import Full, Lightning
from sextant.axes.kv import RoPE
from sextant.axes.numerics import FP32
from sextant.axes.routing import Auxiliary
from sextant.axes.stability import DeepNorm
from sextant.convert import export_weights, import_weights, spec_from_hf, to_disk
from sextant.convert.hf import LEFTOVERS
from sextant.core.errors import UsageError
from sextant.core.stream import Stream
from sextant.recipes import minimax_text_01

CLOSE = 1e-5
FACTORS = {f"{part}_{which}_factor": value for part in ("full_attn", "linear_attn", "mlp")
           for which, value in (("alpha", 1.7), ("beta", 0.9))}
CONFIG = {
    "num_attention_heads": 4, "num_hidden_layers": 4, "num_local_experts": 5, "num_experts_per_tok": 2,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"], "block_size": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, **FACTORS,
}
CASE = Case("minimax", CONFIG, length=61)
RELEASED = {
    "architectures": ["MiniMaxText01ForCausalLM"], "attention_dropout": 0.0,
    "attn_type_list": 10 * [0, 0, 0, 0, 0, 0, 0, 1], "bos_token_id": None, "eos_token_id": None, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 6144, "initializer_range": 0.02, "intermediate_size": 9216,
    "layernorm_full_attention_alpha": 3.5565588200778455, "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_alpha": 3.5565588200778455, "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_alpha": 3.5565588200778455, "layernorm_mlp_beta": 1.0, "max_position_embeddings": 10_240_000,
    "model_type": "minimax_text_01", "num_attention_heads": 64, "num_experts_per_tok": 2, "num_hidden_layers": 80,
    "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False, "postnorm": True,
    "rms_norm_eps": 1e-05, "rope_theta": 10_000_000, "rotary_dim": 64, "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0, "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid", "sliding_window": None,
    "tie_word_embeddings": False, "use_cache": True, "vocab_size": 200_064,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    return make_pair(CASE, tmp_path_factory.mktemp("minimax"))


def parameters_of(pair: Pair) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in pair.disk.items() if not name.endswith(LEFTOVERS)}


def test_la_9_lightning_layer(pair: Pair):
    """Output and gradient of one layer by itself, over four blocks of theirs and nine other ones of ours."""
    generator = torch.Generator().manual_seed(2)
    x_TD, upstream_TD = (torch.randn(61, 48, generator=generator) for _ in range(2))
    theirs, ours = pair.theirs.model.layers[1].self_attn, pair.ours.spec.layers[1].attention
    other = ours.replace(chunk=7).build(48, FP32())
    other.load_state_dict(pair.ours.blocks[1].attention.mixer.state_dict())
    x_TD.requires_grad_()
    want_TD, got_TD = theirs(x_TD[None], None, None)[0][0], other(x_TD, Stream.of_lengths([61]), None)
    assert gap(got_TD, want_TD) < CLOSE
    want_grad, got_grad = (torch.autograd.grad(y_TD, x_TD, upstream_TD)[0] for y_TD in (want_TD, got_TD))
    assert gap(got_grad, want_grad) < CLOSE


@pytest.mark.parametrize("batch, length", [(1, 61), (2, 61), (2, 5)])
def test_logits_and_gradients(pair: Pair, batch: int, length: int, tmp_path):
    tokens_BT = tokens(batch, length, seed=batch)
    theirs, ours = pair.theirs(tokens_BT).logits, pair.ours.batch_logits(tokens_BT)
    assert gap(ours, theirs) < CLOSE
    assert gap(ours[:, -5:], theirs[:, -5:]) < CLOSE
    for model, logits_BTP in ((pair.theirs, theirs), (pair.ours, ours)):
        model.zero_grad()
        F.cross_entropy(logits_BTP[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()
    expected = gradients_on_disk(pair.theirs, tmp_path)
    got = to_disk({name: p.grad for name, p in pair.ours.named_parameters() if p.grad is not None}, "minimax")
    assert got.keys() == {name for name in expected if not name.endswith(LEFTOVERS)}
    gaps = {name: gap(got[name], expected[name]) for name in got}
    print(f"largest gap of a gradient: {max(gaps.values()):.1e}")
    assert max(gaps.values()) < CLOSE, max(gaps.items(), key=lambda item: item[1])


@torch.no_grad()
def test_packed_documents_equal_separate_ones(pair: Pair):
    lengths = [40, 1, 13, 17, 17]
    tokens_T = tokens(sum(lengths))
    ours_TP = pair.ours.logits(pair.ours(tokens_T, Stream.of_lengths(lengths)).hidden_TD)
    theirs_TP = torch.cat([pair.theirs(part[None]).logits[0] for part in tokens_T.split(lengths)])
    assert gap(ours_TP, theirs_TP) < CLOSE


@torch.no_grad()
def test_decoding_equals_their_full_forward(pair: Pair):
    tokens_BT = tokens(2, 61)
    memory, pieces = pair.ours.memory(2), []
    for chunk_BT in tokens_BT.split([19, 5, 3] + [1] * 34, dim=1):
        stream = Stream.of_lengths([chunk_BT.shape[1]] * 2, memory=memory)
        pieces.append(pair.ours.logits(pair.ours(chunk_BT.flatten(), stream).hidden_TD).unflatten(0, (2, -1)))
    assert gap(torch.cat(pieces, dim=1), pair.theirs(tokens_BT).logits) < CLOSE


@pytest.mark.parametrize(
    "mistake",
    [
        "layers[0].attention.fade=0.5", "layers[3].attention.fade=1.0", "layers[*].residual.alpha=1.0",
        "layers[*].residual.beta=1.0", "layers[*].feed_forward.router.normalize=false",
        "layers[2].kv.position.fraction=0.5",
    ],
)
@torch.no_grad()
def test_a_wrong_declaration_is_seen(pair: Pair, mistake: str):
    wrong = pair.ours.spec.override(mistake).build()
    import_weights(wrong, pair.disk, "minimax")
    tokens_BT = tokens(1, 61)
    assert gap(wrong.batch_logits(tokens_BT), pair.theirs(tokens_BT).logits) > 10 * CLOSE


def test_decay_tables_are_passed_over_and_nothing_else_is_lost(pair: Pair):
    """With and without their tables it is the same model, and what comes back is every parameter, bit for bit."""
    parameters = parameters_of(pair)
    assert len(pair.disk) - len(parameters) == 4 * 3
    other = spec_from_hf(pair.config).build(seed=5)
    import_weights(other, parameters, "minimax")
    back = export_weights(other, "minimax")
    assert back.keys() == parameters.keys()
    assert all(torch.equal(back[name], parameters[name]) for name in back)


def test_balance_loss_of_each_layer(pair: Pair):
    """Theirs is 2 (= experts met) times ours, whose shares of copies sum to 1."""
    from transformers.models.minimax.modeling_minimax import load_balancing_loss_func

    tokens_T, stream = tokens(2 * 31), Stream.of_lengths([31, 31])
    for routing in pair.ours(tokens_T, stream).routings.values():
        ours = Auxiliary(coef=1.0).loss(routing, stream, None, tokens_T.numel())
        logits_TE = routing.logits_TE.detach()
        assert 2 * ours.item() == pytest.approx(load_balancing_loss_func((logits_TE,), 5, 2).item(), rel=1e-6)
        assert not 0.99 < ours.item() < 1.01


def test_the_released_file_is_the_recipe():
    """But for what the extension to long context changed, and what acts in training: start, balance, dropping."""
    spec = spec_from_hf(RELEASED, name="minimax-text-01")
    recipe = minimax_text_01.paper().model
    recipe = recipe.replace(init=spec.init)
    no_drops = "layers[*].feed_forward.overflow={kind: dropless}"
    for same in ("context=8192", "layers[*].feed_forward.balance=[]", no_drops):
        spec, recipe = spec.override(same), recipe.override(same)
    layers = [
        layer.replace(kv=layer.kv.replace(position=layer.kv.position.replace(base=10_000.0))) if layer.kv else layer
        for layer in spec.layers
    ]
    assert spec.replace(layers=tuple(layers)) == recipe
    assert spec_from_hf({**RELEASED, "model_type": "minimax_m1"}, name="minimax-text-01").layers[7].kv.position == RoPE(
        base=1e7, fraction=0.5
    )


def test_their_defaults_alternate_and_start_with_softmax():
    config = {key: value for key, value in CONFIG.items() if key not in ("layer_types", *FACTORS)}
    spec = spec_from_hf({**BASE, **config, "model_type": "minimax"})
    assert [type(layer.attention) for layer in spec.layers] == 2 * [Full, Lightning]
    assert {(layer.residual.alpha, layer.residual.beta) for layer in spec.layers} == {(1.0, 1.0)}
    assert all(isinstance(layer.residual, DeepNorm) for layer in spec.layers)


@pytest.mark.parametrize(
    "config, more, words",
    [
        (RELEASED, {"postnorm": False}, "postnorm"),
        (RELEASED, {"shared_intermediate_size": 9216}, "shared_intermediate_size"),
        (RELEASED, {"attn_type_list": [0, 1]}, "layer_types (got 2"),
        (RELEASED, {"attn_type_list": None}, "attn_type_list"),
        (RELEASED, {"hidden_act": "gelu"}, "hidden_act"),
        (RELEASED, {"layernorm_mlp_alpha": 1.0}, "mlp_alpha_factor"),
        (RELEASED, {"num_attention_heads": 48}, "a power of 2"),
        (RELEASED, {"surprise": 1}, "surprise"),
    ],
)
def test_what_we_do_not_have_is_refused_by_name(config, more, words):
    with pytest.raises(UsageError) as caught:
        spec_from_hf({**config, **more})
    assert words in str(caught.value)

