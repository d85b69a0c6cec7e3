"""How each family of transformers is declared here: its ``config.json`` becomes a :class:`ModelSpec`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from sextant.axes.attention import DSA, Full, Lightning, Pattern, Window
from sextant.axes.attention.lightning import fade
from sextant.axes.capacity import Dense, Experts
from sextant.axes.capacity.activation import Activation
from sextant.axes.kv import GQA, MLA, RoPE
from sextant.axes.routing import Auxiliary, Groups, SigmoidTopK, SoftmaxTopK
from sextant.axes.stability import AnyNorm, DeepNorm, LayerNorm, NormalInit, PreNorm, RMSNorm, SandwichNorm
from sextant.convert.fields import NUMBER, Fields, one_rope, ropes_by_type
from sextant.core.errors import UsageError
from sextant.model.spec import Layer, ModelSpec, stack

ACTIVATIONS: dict[str, Activation] = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh"}


def _pattern(window: int | None, context: int) -> Full | Window:
    """A window as long as the context hides nothing: that is full attention, and budgeted as such."""
    return Full() if window is None or window >= context else Window(window=window)


def _heads(fields: Fields, width: int, position: RoPE, **more: Any) -> GQA:
    heads = fields.need("num_attention_heads")
    return GQA(
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", int, heads),
        head_dim=fields.take("head_dim", int, width // heads),
        position=position,
        **more,
    )


def _ends(fields: Fields, norm: AnyNorm, width: int, context: int, tied: bool) -> dict[str, Any]:
    """What every family says alike about the model around its layers."""
    return {
        "vocab": fields.need("vocab_size"),
        "width": width,
        "context": context,
        "final_norm": norm,
        "tied": fields.take("tie_word_embeddings", bool, tied),
        "init": NormalInit(std=float(fields.take("initializer_range", NUMBER, 0.02))),
    }


def _norm(fields: Fields, unit_offset: bool = False) -> RMSNorm:
    return RMSNorm(eps=float(fields.need("rms_norm_eps", float)), unit_offset=unit_offset)


def _llama(fields: Fields, name: str) -> ModelSpec:
    """Llama 1 to 3 and, with a window in every layer, Mistral."""
    fields.only(attention_bias=False, mlp_bias=False, attention_dropout=0.0)
    width, context, norm = fields.need("hidden_size"), fields.need("max_position_embeddings"), _norm(fields)
    layers = stack(
        fields.need("num_hidden_layers"),
        attention=_pattern(fields.take("sliding_window", int), context),
        kv=_heads(fields, width, one_rope(fields, context)),
        feed_forward=Dense(
            hidden=fields.need("intermediate_size"), activation=fields.choose("hidden_act", ACTIVATIONS, "silu")
        ),
        residual=PreNorm(norm=norm),
    )
    return ModelSpec(name=name, layers=layers, **_ends(fields, norm, width, context, tied=False))


def _mixtral(fields: Fields, name: str) -> ModelSpec:
    """Mistral's block with experts, gates normalised over the chosen."""
    fields.only(attention_dropout=0.0, router_jitter_noise=0.0)
    width, context, norm = fields.need("hidden_size"), fields.need("max_position_embeddings"), _norm(fields)
    depth = fields.need("num_hidden_layers")
    layers = stack(
        depth,
        attention=_pattern(fields.take("sliding_window", int), context),
        kv=_heads(fields, width, one_rope(fields, context, theta=1e6)),
        feed_forward=_experts(fields, depth),
        residual=PreNorm(norm=norm),
    )
    return ModelSpec(name=name, layers=layers, **_ends(fields, norm, width, context, tied=False))


def _experts(fields: Fields, layers: int) -> Experts:
    experts, hidden = fields.need("num_local_experts"), fields.need("intermediate_size")
    return _softmax_experts(fields, layers, experts, hidden, normalize=True)


def _softmax_experts(fields: Fields, layers: int, experts: int, hidden: int, *, normalize: bool) -> Experts:
    """A mixture with the loss of Mixtral and its followers, pooled over this many layers."""
    top_k, coef = fields.need("num_experts_per_tok"), fields.take("router_aux_loss_coef", NUMBER, 0.001, zero=True)
    return Experts(
        experts=experts, hidden=hidden, router=SoftmaxTopK(top_k=top_k, normalize=normalize),
        activation=fields.choose("hidden_act", ACTIVATIONS, "silu"), balance=_pooled(coef, top_k, layers),
    )


def _pooled(coef: float, top_k: int, layers: int) -> tuple[Auxiliary, ...]:
    return (Auxiliary(coef=balance_coef(coef, top_k, layers)),) if coef else ()


def balance_coef(coef: float, top_k: int, layers: int) -> float:
    """Our coefficient for a ``router_aux_loss_coef``.

    Theirs multiplies ``E sum_e f_e P_e`` with ``f`` that sums to ``top_k`` and with ``f`` and ``P`` pooled over the
    layers; ours has ``f`` sum to 1 and adds the layers up. The two agree when all layers share one load.
    """
    return coef * top_k / layers


def _olmoe(fields: Fields, name: str) -> ModelSpec:
    """Fine experts with raw gates, and one norm over the queries, or keys, of all heads. Clipping comes after that norm
    there and before it here, so it is refused.
    """
    fields.only(attention_bias=False, attention_dropout=0.0, clip_qkv=None)
    width, context, norm = fields.need("hidden_size"), fields.need("max_position_embeddings"), _norm(fields)
    depth, hidden = fields.need("num_hidden_layers"), fields.need("intermediate_size")
    normalize = fields.take("norm_topk_prob", bool, False)
    layers = stack(
        depth,
        kv=_heads(fields, width, one_rope(fields, context), qk_norm=norm, qk_norm_over="all"),
        feed_forward=_softmax_experts(fields, depth, _number_of_experts(fields), hidden, normalize=normalize),
        residual=PreNorm(norm=norm),
    )
    return ModelSpec(name=name, layers=layers, **_ends(fields, norm, width, context, tied=False))


def _qwen3_moe(fields: Fields, name: str) -> ModelSpec:
    """Heads with a norm each; a mixture in every ``decoder_sparse_step``-th layer that is not said to be dense."""
    fields.only(attention_bias=False, attention_dropout=0.0)
    width, context, norm = fields.need("hidden_size"), fields.need("max_position_embeddings"), _norm(fields)
    depth = fields.need("num_hidden_layers")
    layers = stack(
        depth,
        attention=_qwen3_pattern(fields, context),
        kv=_heads(fields, width, one_rope(fields, context), qk_norm=norm),
        feed_forward=_qwen3_feed_forward(fields, depth),
        residual=PreNorm(norm=norm),
    )
    return ModelSpec(name=name, layers=layers, **_ends(fields, norm, width, context, tied=False))


def _qwen3_pattern(fields: Fields, context: int) -> Full | Window:
    """``sliding_window`` counts where ``use_sliding_window`` says so; then all layers have it."""
    window, used = fields.take("sliding_window", int, 4096), fields.take("use_sliding_window", bool, False)
    fields.left.pop("max_window_layers", None)  # in older files; no class reads it
    return _pattern(window if used else None, context)


def _qwen3_feed_forward(fields: Fields, depth: int) -> list[Dense | Experts]:
    step, plain = fields.take("decoder_sparse_step", int, 1), fields.take("mlp_only_layers", list, [])
    sparse = [layer not in plain and (layer + 1) % step == 0 for layer in range(depth)]
    hidden, normalize = fields.need("moe_intermediate_size"), fields.take("norm_topk_prob", bool, False)
    experts = _softmax_experts(fields, max(1, sum(sparse)), _number_of_experts(fields), hidden, normalize=normalize)
    dense = Dense(hidden=fields.need("intermediate_size"), activation=experts.activation)
    return [experts if mixture else dense for mixture in sparse]


def _number_of_experts(fields: Fields) -> int:
    """Older and newer files have a name each for it."""
    return fields.take("num_experts", int) or fields.need("num_local_experts")


def _dbrx(fields: Fields, name: str) -> ModelSpec:
    """LayerNorm without bias, clipped projections, experts as tall matrices."""
    width, context, depth = fields.need("d_model"), fields.need("max_seq_len"), fields.need("n_layers")
    fields.only(resid_pdrop=0.0, emb_pdrop=0.0)
    fields.left.pop("router_aux_loss_coef", None)  # in older files; the class reads ffn_config's
    norm = LayerNorm(eps=1e-5, bias=False)
    layers = stack(
        depth,
        kv=_dbrx_heads(fields, width, context),
        feed_forward=_dbrx_experts(fields, width, depth),
        residual=PreNorm(norm=norm),
    )
    return ModelSpec(name=name, layers=layers, **_ends(fields, norm, width, context, tied=False))


def _dbrx_heads(fields: Fields, width: int, context: int) -> GQA:
    part, heads = Fields(fields.need("attn_config", dict), "config.json: attn_config"), fields.need("n_heads")
    part.only(attn_pdrop=0.0)
    groups, clip = part.take("kv_n_heads", int, 1), part.take("clip_qkv", NUMBER)
    fields.only(num_key_value_heads=groups)
    position = one_rope(fields, context, theta=float(part.take("rope_theta", NUMBER, 10_000.0)))
    part.done()
    clip = None if clip is None else float(clip)
    return GQA(heads=heads, kv_heads=groups, head_dim=width // heads, position=position, clip=clip)


def _dbrx_experts(fields: Fields, width: int, layers: int) -> Experts:
    """``moe_normalize_expert_weights`` is the exponent of a norm, or null. The noise of training is on the router's
    input here, as in MegaBlocks; transformers lets the experts see it too.
    """
    given = {"moe_normalize_expert_weights": 1.0, **fields.need("ffn_config", dict)}
    part = Fields(given, "config.json: ffn_config")
    part.only(hidden_size=width, ffn_act_fn={"name": "silu"})
    coef, top_k = part.take("moe_loss_weight", NUMBER, 0.01, zero=True), part.take("moe_top_k", int, 1)
    p_norm = part.take("moe_normalize_expert_weights", NUMBER)
    jitter = float(part.take("moe_jitter_eps", NUMBER, 0.0, zero=True))
    experts = Experts(
        experts=part.take("moe_num_experts", int, 4), hidden=part.take("ffn_hidden_size", int, 3584),
        router=SoftmaxTopK(top_k=top_k, normalize=bool(p_norm), p_norm=float(p_norm or 1.0), jitter=jitter),
        balance=_pooled(coef, top_k, layers),
    )
    part.done()
    return experts


def _gemma3(fields: Fields, name: str) -> ModelSpec:
    """Gemma 3's text tower: two windows and rotary codes, norms on both sides with the gain's distance from 1."""
    fields.only(attention_bias=False, attention_dropout=0.0)
    fields.only(attn_logit_softcapping=None, use_bidirectional_attention=False)
    width, context = fields.need("hidden_size"), fields.need("max_position_embeddings")
    norm, scale = _norm(fields, unit_offset=True), fields.need("query_pre_attn_scalar", NUMBER) ** -0.5
    kinds = _layer_types(fields, fields.need("num_hidden_layers"))
    ropes, local = ropes_by_type(fields, context), _pattern(fields.need("sliding_window"), context)
    kv = _heads(fields, width, ropes["full_attention"], qk_norm=norm, scale=scale)
    layers = stack(
        len(kinds),
        attention=[local if kind == "sliding_attention" else Full() for kind in kinds],
        kv=[kv.replace(position=ropes[kind]) for kind in kinds],
        feed_forward=Dense(
            hidden=fields.need("intermediate_size"),
            activation=fields.choose("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        ),
        residual=SandwichNorm(norm=norm),
    )
    softcap = fields.take("final_logit_softcapping", NUMBER)
    ends = _ends(fields, norm, width, context, tied=True)
    return ModelSpec(name=name, layers=layers, embedding_scale=math.sqrt(width), softcap=softcap, **ends)


def _deepseek(fields: Fields, name: str, attention: Callable[[Fields], Pattern] = lambda _: Full()) -> ModelSpec:
    """DeepSeek-V2, V3 and V3.2: latent attention, the first layers dense, fine-grained experts after them."""
    fields.only(attention_dropout=0.0, mlp_bias=False, moe_layer_freq=1, ep_size=1)
    width, context, norm = fields.need("hidden_size"), fields.need("max_position_embeddings"), _norm(fields)
    depth = fields.need("num_hidden_layers")
    layers = stack(
        depth,
        attention=attention(fields),
        kv=_mla(fields, context),
        feed_forward=_deepseek_feed_forward(fields, depth),
        residual=PreNorm(norm=norm),
    )
    return ModelSpec(name=name, layers=layers, **_ends(fields, norm, width, context, tied=False))


def _mla(fields: Fields, context: int) -> MLA:
    """The norms of the latents keep their own eps, whatever ``rms_norm_eps`` says."""
    heads, rope_dim = fields.need("num_attention_heads"), fields.need("qk_rope_head_dim")
    nope_dim = fields.need("qk_nope_head_dim")
    fields.only(num_key_value_heads=heads, head_dim=rope_dim, qk_head_dim=nope_dim + rope_dim)
    interleaved = fields.take("rope_interleave", bool, True)
    code = one_rope(fields, context).replace(layout="interleaved" if interleaved else "half")
    return MLA(
        heads=heads, rank=fields.need("kv_lora_rank"), nope_dim=nope_dim, rope_dim=rope_dim,
        v_dim=fields.need("v_head_dim"), q_rank=fields.take("q_lora_rank", int), position=code,
        bias=fields.take("attention_bias", bool, False),
    )


_FOR_EXPERTS = (
    "aux_loss_alpha", "moe_intermediate_size", "n_group", "n_routed_experts", "n_shared_experts", "norm_topk_prob",
    "num_experts_per_tok", "routed_scaling_factor", "scoring_func", "seq_aux", "topk_group", "topk_method",
)
"""Fields without meaning where every layer is dense."""


def _deepseek_feed_forward(fields: Fields, depth: int) -> list[Dense | Experts]:
    """Dense layers, then experts."""
    activation = fields.choose("hidden_act", ACTIVATIONS, "silu")
    dense = Dense(hidden=fields.need("intermediate_size"), activation=activation)
    first = fields.take("first_k_dense_replace", int, 0, zero=True)
    kinds = ["dense"] * min(first, depth) + ["sparse"] * max(0, depth - first)
    fields.only(mlp_layer_types=kinds)
    if first >= depth:
        for name in _FOR_EXPERTS:
            fields.left.pop(name, None)
        return [dense] * depth
    return [dense] * first + [_fine_experts(fields, activation)] * (depth - first)


def _fine_experts(fields: Fields, activation: Activation) -> Experts:
    """The balance losses act in training only, and their constants in released files are not the papers'."""
    for name in ("seq_aux", "aux_loss_alpha"):
        fields.left.pop(name, None)
    hidden, routers = fields.need("moe_intermediate_size"), {"softmax": _softmax_router, "sigmoid": _sigmoid_router}
    return Experts(
        experts=fields.need("n_routed_experts"), hidden=hidden, activation=activation,
        router=fields.choose("scoring_func", routers, "softmax")(fields),
        shared=hidden * fields.take("n_shared_experts", int, 0, zero=True),
    )


def _softmax_router(fields: Fields) -> SoftmaxTopK:
    """V2's, inside few groups, and V2-Lite's over all; transformers does not heed ``norm_topk_prob``."""
    fields.only(norm_topk_prob=False)
    groups = _groups(fields, "max")
    limited = fields.choose("topk_method", {"greedy": False, "group_limited_greedy": True}, "greedy")
    return SoftmaxTopK(groups=groups if limited else None, **_choice(fields))


def _sigmoid_router(fields: Fields) -> SigmoidTopK:
    """V3's, with its bias."""
    fields.only(topk_method="noaux_tc")
    normalize = fields.take("norm_topk_prob", bool, True)
    return SigmoidTopK(groups=_groups(fields, "top2"), normalize=normalize, **_choice(fields))


def _choice(fields: Fields) -> dict[str, Any]:
    scale = float(fields.take("routed_scaling_factor", NUMBER, 1.0))
    return {"top_k": fields.need("num_experts_per_tok"), "scale": scale}


def _groups(fields: Fields, score: Literal["max", "top2"]) -> Groups | None:
    """One group is no limit."""
    count, kept = fields.take("n_group", int, 1), fields.take("topk_group", int, 1)
    return Groups(count=count, kept=kept, score=score) if count > 1 else None


MODULES = ("num_nextn_predict_layers", "num_mtp_layers")
"""How many prediction modules there are, by either name."""


def _deepseek_v3(fields: Fields, name: str) -> ModelSpec:
    """Its prediction modules are asked for apart: transformers tells of them, but neither runs nor saves any."""
    for modules in MODULES:
        fields.left.pop(modules, None)
    return _deepseek(fields, name)


INDEXED = ("indexed_attention", "deepseek_sparse_attention")
"""Newer and older name of a layer with an indexer."""


def _deepseek_v32(fields: Fields, name: str) -> ModelSpec:
    """V3 with an indexer in every layer, whose rotary channels are as many as the main attention's."""
    for modules in MODULES:
        fields.left.pop(modules, None)
    if kinds := fields.take("layer_types", list):
        fields.left["layer_types"] = [INDEXED[0] if kind in INDEXED else kind for kind in kinds]
    fields.only(layer_types=[INDEXED[0]] * fields.left.get("num_hidden_layers", 0))
    return _deepseek(fields, name, _dsa)


def _dsa(fields: Fields) -> DSA:
    return DSA(
        top_k=fields.need("index_topk"), heads=fields.need("index_n_heads"), head_dim=fields.need("index_head_dim"),
        rope_dim=fields.left.get("qk_rope_head_dim", 0),
    )


def _layer_types(fields: Fields, layers: int) -> list[str]:
    """The kind of each layer, given or by period: every ``sliding_window_pattern``-th layer is global."""
    period = fields.take("_sliding_window_pattern", int, fields.take("sliding_window_pattern", int, 6))
    by_period = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)]
    return _kinds(fields, by_period, "sliding_attention")


def _kinds(fields: Fields, default: list[str], other: str) -> list[str]:
    """``layer_types``: the default's number of layers, each of this other kind or of full attention."""
    kinds = fields.take("layer_types", list, default)
    if len(kinds) != len(default) or set(kinds) - {other, "full_attention"}:
        raise UsageError(
            "unsupported field in a model configuration",
            where="config.json: layer_types",
            got=f"{len(kinds)} of {', '.join(sorted(set(kinds)))}",
            expected=f"{len(default)} of {other} or full_attention",
        )
    return kinds


def _their_fade(layer: int, layers: int) -> float:
    """Transformers' spelling of :func:`fade`; in 80 layers they differ by less than 2e-7."""
    return 1 - layer / (layers - 1 + 1e-5) + 1e-5


def _minimax(fields: Fields, name: str, fade: Callable[[int, int], float] = _their_fade) -> ModelSpec:
    """MiniMax-01 under transformers' names. Its class turns whole heads whatever ``rotary_dim`` says; the weights were
    trained with the part, so the part is what we read (spec minimax-01, section 14.5).
    """
    fields.only(attention_dropout=0.0, router_jitter_noise=0.0, hidden_act="silu")
    width, context, norm = fields.need("hidden_size"), fields.need("max_position_embeddings"), _norm(fields)
    depth, full = fields.need("num_hidden_layers"), _pattern(fields.take("sliding_window", int), context)
    by_turns = ["linear_attention" if i % 2 else "full_attention" for i in range(depth)]
    kinds = _kinds(fields, by_turns, "linear_attention")
    softmax, linear = _minimax_heads(fields, width, context)
    rest = {"residual": _deep_norm(fields, kinds, norm), "feed_forward": _experts(fields, depth)}
    layers = [
        Layer(attention=full, kv=softmax, **rest) if kind == "full_attention"
        else Layer(attention=linear.replace(fade=fade(i, depth)), **rest)
        for i, kind in enumerate(kinds)
    ]
    return ModelSpec(name=name, layers=tuple(layers), **_ends(fields, norm, width, context, tied=False))


def _minimax_heads(fields: Fields, width: int, context: int) -> tuple[GQA, Lightning]:
    """Heads of the softmax layers, and a lightning layer whose slopes have not faded."""
    kv = _heads(fields, width, one_rope(fields, context, theta=1e6))
    if kv.heads & (kv.heads - 1):
        raise UsageError(
            "unsupported field in a model configuration", where="config.json: num_attention_heads", got=kv.heads,
            expected="a power of 2: for others the released code and transformers disagree on the decays",
        )
    part = fields.take("rotary_dim", int, kv.head_dim) / kv.head_dim
    position = kv.position.replace(fraction=part)
    return kv.replace(position=position), Lightning(
        heads=kv.heads, head_dim=kv.head_dim, chunk=fields.take("block_size", int, 256)
    )


def _deep_norm(fields: Fields, kinds: list[str], norm: RMSNorm) -> DeepNorm:
    """The placement of all layers, if the factors of its feed-forward are those of every attention there is."""

    def pair(part: str) -> tuple[float, float]:
        alpha, beta = (fields.take(f"{part}_{which}_factor", NUMBER, 1.0) for which in ("alpha", "beta"))
        return float(alpha), float(beta)

    mlp, attention = pair("mlp"), {"full_attention": pair("full_attn"), "linear_attention": pair("linear_attn")}
    if any(attention[kind] != mlp for kind in kinds):
        raise UsageError(
            "unsupported field in a model configuration", where="config.json: mlp_alpha_factor, mlp_beta_factor",
            got=mlp, expected=f"those of the attention: {attention}",
        )
    return DeepNorm(norm=norm, alpha=mlp[0], beta=mlp[1])


MINIMAX_NAMES = {
    f"layernorm_{theirs}_{which}": f"{part}_{which}_factor"
    for theirs, part in (("full_attention", "full_attn"), ("linear_attention", "linear_attn"), ("mlp", "mlp"))
    for which in ("alpha", "beta")
}
"""Fields of the released MiniMax-01 files -> transformers' names (spec minimax-01, section 14.2)."""


def _minimax_released(fields: Fields, name: str) -> ModelSpec:
    """The files that came with the weights of MiniMax-Text-01 and MiniMax-M1."""
    shared, mode = fields.left.pop("shared_intermediate_size", 0), fields.take("shared_moe_mode", str)
    if shared not in (0, [0]):
        raise UsageError(
            "unsupported field in a model configuration", where="config.json: shared_intermediate_size",
            got=f"{shared} ({mode})", expected=0,
        )
    fields.only(postnorm=True)
    kinds = fields.need("attn_type_list", list)
    fields.left["layer_types"] = ["full_attention" if kind else "linear_attention" for kind in kinds]
    for released, ours in MINIMAX_NAMES.items():
        if released in fields.left:
            fields.left[ours] = fields.left.pop(released)
    return _minimax(fields, name, fade)


READERS: dict[str, Callable[[Fields, str], ModelSpec]] = {
    "llama": _llama, "mistral": _llama, "mixtral": _mixtral, "olmoe": _olmoe,
    "qwen3_moe": _qwen3_moe, "dbrx": _dbrx, "gemma3_text": _gemma3, "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek_v3, "deepseek_v32": _deepseek_v32, "minimax": _minimax,
    "minimax_text_01": _minimax_released, "minimax_m1": _minimax_released,
}
"""``model_type`` -> how its configuration is read."""

_V3 = {
    "rms_norm_eps": 1e-6, "first_k_dense_replace": 3, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6},
    "mistral": {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {"rms_norm_eps": 1e-5, "num_key_value_heads": 8},
    "olmoe": {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "router_aux_loss_coef": 0.01},
    "qwen3_moe": {"rms_norm_eps": 1e-6, "num_key_value_heads": 4, "max_position_embeddings": 32_768},
    "dbrx": {},
    "deepseek_v2": {"rms_norm_eps": 1e-6, "topk_method": "greedy"},
    "deepseek_v3": {**_V3, "max_position_embeddings": 4096},
    "deepseek_v32": {
        **_V3, "index_topk": 2048, "index_n_heads": 64, "index_head_dim": 128, "max_position_embeddings": 163_840,
    },
    "minimax": {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "max_position_embeddings": 131_072},
    "minimax_text_01": {"rms_norm_eps": 1e-5},
    "minimax_m1": {"rms_norm_eps": 1e-5},
    "gemma3_text": {
        "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "max_position_embeddings": 131_072,
    },
}
"""What published files leave out because transformers fills it in; a null in the file is not left out."""
