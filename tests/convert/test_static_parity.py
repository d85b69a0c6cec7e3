"""Static patterns against transformers in fp32: Longformer's and BigBird's encoder masks, gpt-oss's learned sinks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle_hf import gap, tokens
from torch import Tensor

from sextant.axes.attention import LearnedSink
from sextant.axes.attention.bigbird import encoder_mask as bigbird_mask
from sextant.axes.attention.longformer import encoder_mask as longformer_mask
from sextant.axes.capacity import Dense
from sextant.axes.kv import GQA, RoPE, YaRNScaling
from sextant.axes.stability import PreNorm, RMSNorm
from sextant.convert import maps, to_disk
from sextant.kernels.attention import Scores, attend_dense
from sextant.model.spec import ModelSpec, stack

CLOSE = 1e-5
HEADS, WIDTH = 3, 24


def of_their_projections(layer, x_TD: Tensor, mask_HTS: Tensor) -> Tensor:
    """Our dense attention on their queries, keys and values."""
    q, k, v = (project(x_TD).unflatten(-1, (HEADS, -1)) for project in (layer.query, layer.key, layer.value))
    return attend_dense(q, k, v, mask_HTS, Scores((WIDTH // HEADS) ** -0.5))[0].flatten(1)


@pytest.mark.parametrize("length, window, places", [(32, 8, [0, 1]), (24, 4, [0, 7, 23]), (16, 8, []), (36, 12, [5])])
@torch.no_grad()
def test_longformer_encoder_mask(length, window, places):
    """Their global projections get the local weights, so that the mask is all that may differ."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    torch.manual_seed(1)
    config = LongformerConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, attention_window=[window], attention_probs_dropout_prob=0.0
    )
    layer = LongformerSelfAttention(config, 0).eval()
    for name in ("query", "key", "value"):
        torch.nn.init.normal_(getattr(layer, name).weight, std=0.4)
        getattr(layer, f"{name}_global").load_state_dict(getattr(layer, name).state_dict())
    x_TD, global_T = torch.randn(length, WIDTH), torch.zeros(length, dtype=torch.bool)
    global_T[places] = True
    theirs = layer(
        x_TD[None], attention_mask=torch.where(global_T, 10_000.0, 0.0)[None],
        is_index_masked=torch.zeros_like(global_T)[None], is_index_global_attn=global_T[None],
        is_global_attn=bool(places),
    )[0][0]
    mask_TS = longformer_mask(global_T, window // 2)
    assert gap(of_their_projections(layer, x_TD, mask_TS), theirs) < CLOSE
    off = longformer_mask(global_T, window // 2 - 1)
    assert gap(of_their_projections(layer, x_TD, off), theirs) > 1000 * CLOSE


@torch.no_grad()
def test_bigbird_encoder_mask():
    """Their own draw of random blocks, head by head; the rest of the mask is ours."""
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    torch.manual_seed(1)
    block, count, drawn, seed = 4, 16, 2, 5
    config = BigBirdConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, block_size=block, num_random_blocks=drawn,
        max_position_embeddings=256,
    )
    layer = BigBirdBlockSparseAttention(config, seed=seed).train()
    for project in (layer.query, layer.key, layer.value):
        torch.nn.init.normal_(project.weight, std=0.4)
    x_TD, length = torch.randn(block * count, WIDTH), block * count
    blocked, band, source, target = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(1, length), block)
    theirs = layer(x_TD[None], band, source, target, blocked, blocked)[0][0]

    np.random.seed(seed)
    plan = layer._get_rand_attn_plan(length, block, drawn)
    table = layer._bigbird_block_rand_mask_with_head(length, length, block, block, HEADS, *plan)
    masks = []
    for random_MJ in torch.tensor(np.stack(table)).long():
        whole_MJ = torch.cat([torch.zeros(1, drawn).long(), random_MJ, torch.zeros(1, drawn).long()])  # ends read all
        masks.append(bigbird_mask(whole_MJ).repeat_interleave(block, 0).repeat_interleave(block, 1))
    mask_HTS = torch.stack(masks)
    assert not torch.equal(mask_HTS[0], mask_HTS[1])
    assert gap(of_their_projections(layer, x_TD, mask_HTS), theirs) < CLOSE
    assert gap(of_their_projections(layer, x_TD, mask_HTS.roll(1, 0)), theirs) > 1000 * CLOSE


YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 32,
}
FAMILY = maps.ENDS + maps.ATTENTION + maps.BIASES + maps.SINKS + maps.PRE_NORMS
NORM = RMSNorm(eps=1e-5)


def gpt_oss():
    """Theirs with experts that say nothing and no bias behind the heads, neither of which we have."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        num_hidden_layers=3, num_local_experts=4, num_experts_per_tok=2, vocab_size=61, hidden_size=24,
        intermediate_size=8, head_dim=16, num_attention_heads=4, num_key_value_heads=2, sliding_window=6,
        rope_parameters=YARN, max_position_embeddings=128, pad_token_id=None,
    )
    config._attn_implementation = "eager"
    model, generator = GptOssForCausalLM(config).eval(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
            if "down_proj" in name or name.endswith("o_proj.bias"):
                parameter.zero_()
    return model


def ours_like(theirs):
    """The same attention by our declarations, filled through the map; the feed-forward gives 0."""
    scaling = YaRNScaling(factor=4.0, original=32, truncate=False)
    kv = GQA(heads=4, kv_heads=2, head_dim=16, bias=True, position=RoPE(base=500.0, scaling=scaling))
    layers = stack(
        3, attention=[LearnedSink(window=6), LearnedSink(), LearnedSink(window=6)], kv=kv,
        feed_forward=Dense(hidden=4), residual=PreNorm(norm=NORM),
    )
    model = ModelSpec(name="sinks", vocab=61, width=24, context=128, layers=layers, final_norm=NORM).build(seed=1)
    disk, mine = dict(theirs.named_parameters()), {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "feed_forward" in name and "norm" not in name:
                parameter.zero_()
            else:
                mine[name] = parameter
        for link in maps.links("gpt_oss_attention", {name: parameter.shape for name, parameter in mine.items()}):
            for name, tensor in link.join(disk).items():
                mine[name].copy_(tensor)
    for block in model.blocks:
        theirs.model.rotary_emb.inv_freq.copy_(torch.tensor(block.attention.kv.position.frequencies))
    return model, mine


def test_gpt_oss_sinks_logits_and_gradients(monkeypatch):
    """Windows of 6 and all keys in turn, beyond the window and the stretched positions."""
    monkeypatch.setitem(maps.FAMILIES, "gpt_oss_attention", FAMILY)
    theirs = gpt_oss()
    ours, mine = ours_like(theirs)
    tokens_BT = tokens(2, 70)
    logits, expected = ours.batch_logits(tokens_BT), theirs(tokens_BT).logits
    assert gap(logits, expected) < CLOSE and gap(logits[:, -5:], expected[:, -5:]) < CLOSE
    weight = torch.randn(expected.shape)
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    got = to_disk({name: p.grad for name, p in mine.items() if p.grad is not None}, "gpt_oss_attention")
    names = {name for name, _ in theirs.named_parameters() if "mlp" not in name and "post_attention" not in name}
    assert names - set(got) == {f"model.layers.{i}.self_attn.o_proj.bias" for i in range(3)}
    assert sum("sinks" in name for name in got) == 3
    want = dict(theirs.named_parameters())
    gaps = {name: gap(got[name], want[name].grad) for name in names & set(got)}
    assert max(gaps.values()) < CLOSE, max(gaps.items(), key=lambda item: item[1])


@torch.no_grad()
def test_gpt_oss_without_its_sinks_is_seen(monkeypatch):
    monkeypatch.setitem(maps.FAMILIES, "gpt_oss_attention", FAMILY)
    theirs = gpt_oss()
    ours, mine = ours_like(theirs)
    mine["blocks.1.attention.pattern.sinks_H"].add_(0.1)
    assert gap(ours.batch_logits(tokens(1, 40)), theirs(tokens(1, 40)).logits) > 10 * CLOSE
