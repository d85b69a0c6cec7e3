"""Every rule between parts is refused with its path, its reason and its remedy."""

import pytest
from cases import model_spec

from sextant.axes.attention import (
    DSA,
    NSA,
    BigBird,
    BlockLocal,
    Dilated,
    Fixed,
    Full,
    InfLLM,
    InfLLMV2,
    LearnedSink,
    Longformer,
    MeanPhi,
    MoA,
    MoBA,
    Seer,
    SeerR,
    Strided,
    Window,
)
from sextant.axes.attention.seer import Budget
from sextant.axes.capacity import Dense, Experts
from sextant.axes.kv import GQA, MLA, ALiBi, NoPE
from sextant.axes.routing import Bias, ExpertChoice
from sextant.axes.stability import MuPInit, SandwichNorm
from sextant.core.errors import UsageError
from sextant.model.checks import RULES, check, notes
from sextant.model.spec import Layer

GOOD = Layer(kv=GQA(heads=4, kv_heads=2, head_dim=8), feed_forward=Dense(hidden=8))
WIDER = MuPInit(base_width=10, base_head_dim=8)
BROKEN = {
    "sinks_need_order": (
        GOOD.replace(attention=Window(window=4, sinks=2), kv=GOOD.kv.replace(position=ALiBi())),
        ["model.layers[1].attention.sinks", "ALiBi fades attention sinks", "Use rope or nope, or set sinks to 0"],
    ),
    "window_within_context": (
        GOOD.replace(attention=Window(window=4097)),
        ["model.layers[1].attention.window", "window 4097 exceeds the context 4096", "Use kind: full"],
    ),
    "pattern_meets_kv": (
        GOOD.replace(attention=MoBA(block=4097, top_k=2)),
        ["model.layers[1].attention.block", "block 4097 exceeds the context 4096", "Use a smaller block"],
    ),
    "zero_gain_keeps_a_path": (
        GOOD.replace(residual=SandwichNorm(attention_gain=-0.5)),
        ["model.layers[1].residual.attention_gain", "negative", "Use 0 (off at start) or 1"],
    ),
    "balance_meets_router": (
        GOOD.replace(feed_forward=Experts(experts=4, hidden=8, balance=(Bias(),))),
        ["model.layers[1].feed_forward.balance[0]", "softmax_topk has no selection bias", "Set router.bias: true"],
    ),
    "mup_scales_scores": (
        GOOD.replace(kv=GOOD.kv.replace(head_dim=32)),
        ["model.layers[1].kv.scale", "scores times 0.08839, not 0.1768", "Set kv.scale=0.08839"],
    ),
}


def test_every_rule_has_a_case():
    assert set(BROKEN) == {getattr(rule, "__name__", "") for rule in RULES}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_broken_rule_is_refused_by_name(rule):
    layer, words = BROKEN[rule.__name__]
    spec = model_spec(GOOD, layer, **({"init": WIDER} if rule.__name__.startswith("mup") else {}))
    with pytest.raises(UsageError) as caught:
        check(spec)
    line = str(caught.value)
    assert [word for word in words if word not in line] == [], line
    assert list(rule(spec)) and not any(list(other(spec)) for other in RULES if other is not rule)


CLASHES = {
    "a window and sinks beyond the context": (
        GOOD.replace(attention=Window(window=4095, sinks=2)),
        ["model.layers[1].attention.window", "window 4095 and 2 sinks exceed the context 4096"],
    ),
    "a block mean has no distance": (
        GOOD.replace(attention=MoBA(block=4, top_k=2), kv=GOOD.kv.replace(position=ALiBi())),
        ["model.layers[1].kv.position", "moba cannot rank blocks by ALiBi", "Use rope or nope"],
    ),
    "an indexer without a rotation": (
        GOOD.replace(
            attention=DSA(top_k=4, heads=2, head_dim=8, rope_dim=4), kv=GOOD.kv.replace(position=NoPE())
        ),
        ["model.layers[1].attention.rope_dim", "turns 4 channels", "Set it to 0 or give kv a rope"],
    ),
}
"""More pairs that a pattern refuses, each in its own words."""

ALIBI, ONE_GROUP = GOOD.kv.replace(position=ALiBi()), GOOD.kv.replace(kv_heads=1)
STATIC_CLASHES = {
    "a dilated window beyond the context": (
        GOOD.replace(attention=Dilated(window=2049, dilation=2)),
        ["attention.window", "2049 keys at distance 2 take 4097 tokens", "smaller window or dilation"],
    ),
    "a local block beyond the context": (
        GOOD.replace(attention=BlockLocal(block=4097)), ["attention.block", "block 4097 exceeds", "kind: full"],
    ),
    "a stride beyond the context": (
        GOOD.replace(attention=Strided(stride=4097)), ["attention.stride", "stride 4097 exceeds", "smaller stride"],
    ),
    "strides split over one group": (
        GOOD.replace(attention=Strided(stride=4), kv=ONE_GROUP),
        ["attention.heads", "split needs two KV heads", "Use heads: merged"],
    ),
    "columns split over one group": (
        GOOD.replace(attention=Fixed(block=8), kv=ONE_GROUP),
        ["attention.heads", "split needs two KV heads", "Use heads: merged"],
    ),
    "columns of blocks that never end": (
        GOOD.replace(attention=Fixed(block=4097)), ["attention.block", "no column would ever be read"],
    ),
    "more dilated groups than there are": (
        GOOD.replace(attention=Longformer(window=4, dilation=2, dilated=3)),
        ["attention.dilated", "3 groups are dilated, and there are 2", "Dilate fewer"],
    ),
    "a window that reaches beyond the context": (
        GOOD.replace(attention=Longformer(window=2049, dilation=2, dilated=1)),
        ["attention.window", "reaches over 4097 tokens"],
    ),
    "global tokens that fade": (
        GOOD.replace(attention=Longformer(window=4, global_tokens=2), kv=ALIBI),
        ["attention.global_tokens", "ALiBi fades the first 2 tokens", "set global_tokens to 0"],
    ),
    "blocks that are all read": (
        GOOD.replace(attention=BigBird(block=513)), ["attention.block", "8 blocks of 513 exceed", "kind: full"],
    ),
    "spans for other heads": (
        GOOD.replace(attention=MoA(alpha=(64,), beta=(0.5,))),
        ["attention.alpha", "1 spans for 2 KV heads", "one alpha and one beta for each"],
    ),
    "sinks of spans that fade": (
        GOOD.replace(attention=MoA(alpha=(64, 64), beta=(0.5, 0.5)), kv=ALIBI),
        ["attention.sinks", "ALiBi fades the first 64 tokens"],
    ),
    "a window with a learned sink beyond the context": (
        GOOD.replace(attention=LearnedSink(window=4097)), ["attention.window", "window 4097 exceeds"],
    ),
}
CLASHES |= STATIC_CLASHES

NSA_LAYER = GOOD.replace(attention=NSA(length=4, stride=2, block=4, top_k=3, window=4, phi=MeanPhi()))
LATENT = MLA(heads=4, rank=6, nope_dim=4, rope_dim=2, v_dim=4)
BRANCH_CLASHES = {
    "branches over latents": (
        NSA_LAYER.replace(kv=LATENT),
        ["model.layers[1].kv", "nsa's branches need keys and values per head", "Use kind: gqa"],
    ),
    "compressed keys turned without a rotation": (
        NSA_LAYER.replace(kv=GOOD.kv.replace(position=NoPE())),
        ["attention.cmp_rope", "there is no rope", "Use none"],
    ),
    "nsa's window beyond the context": (
        NSA_LAYER.replace(attention=NSA_LAYER.attention.replace(window=4097)),
        ["attention.window", "window 4097 exceeds the context 4096", "smaller window"],
    ),
    "compressed keys have no distance": (
        NSA_LAYER.replace(kv=ALIBI), ["kv.position", "nsa cannot rank blocks by ALiBi", "Use rope or nope"],
    ),
    "a choice per group over latents": (
        GOOD.replace(attention=InfLLMV2(length=4, stride=2, block=4, window=4), kv=LATENT),
        ["model.layers[1].kv", "infllm_v2 chooses per KV group", "Use kind: gqa"],
    ),
}
CLASHES |= BRANCH_CLASHES

MEMORY = GOOD.replace(attention=InfLLM(block=2, sinks=2, window=4, top_k=1, representatives=1))
GATED = GOOD.replace(attention=SeerR(block=4, width=6, rule=Budget(tokens=8)))
PLAIN_KEY_CLASHES = {
    "far keys at one distance over latents": (
        MEMORY.replace(kv=LATENT), ["model.layers[1].kv", "before their position code, not latents", "Use kv gqa"],
    ),
    "representatives have no distance": (
        MEMORY.replace(kv=ALIBI), ["kv.position", "infllm cannot rank blocks by ALiBi", "Use rope or nope"],
    ),
    "a gate over latents": (
        GATED.replace(kv=LATENT), ["model.layers[1].kv", "seer_r needs each head's queries", "latents do not give"],
    ),
    "a gate's rows have no distance": (
        GOOD.replace(attention=Seer(block=4, rule=Budget(tokens=8)), kv=ALIBI),
        ["kv.position", "seer cannot rank blocks by ALiBi", "Use rope or nope"],
    ),
    "a gate that turns an odd number of channels": (
        GATED.replace(attention=GATED.attention.replace(width=5)),
        ["model.layers[1].attention.width", "seer_r's gate turns an odd number", "even width"],
    ),
}
CLASHES |= PLAIN_KEY_CLASHES


@pytest.mark.parametrize("case", CLASHES)
def test_clash_of_pattern_and_kv_is_refused(case):
    layer, words = CLASHES[case]
    with pytest.raises(UsageError) as caught:
        check(model_spec(GOOD, layer))
    assert [word for word in words if word not in str(caught.value)] == []


def test_sizes_that_multiply_to_nonsense_are_refused():
    huge = GOOD.replace(feed_forward=Experts(experts=2**20, hidden=2**31 - 1))
    with pytest.raises(UsageError, match=r"too many parameters: model \(got 6.*e\+1., expected at most 1e\+15\)"):
        check(model_spec(GOOD, huge))


def test_good_neighbours_pass():
    """Each field on the allowed side of its rule."""
    check(
        model_spec(
            GOOD.replace(attention=Window(window=4094, sinks=2)),
            GOOD.replace(attention=Window(window=4), kv=GOOD.kv.replace(position=ALiBi())),
            GOOD.replace(attention=MoBA(block=4096, top_k=2)),
            GOOD.replace(attention=Full(), residual=SandwichNorm(attention_gain=0.0)),
        )
    )


def test_path_starts_where_the_caller_says():
    with pytest.raises(UsageError, match=r"run\.model\.layers\[0\]\.residual\.attention_gain"):
        check(model_spec(GOOD.replace(residual=SandwichNorm(attention_gain=-1.0))), "run.model")


def test_what_looks_at_other_tokens_is_said():
    choosing = Experts(experts=4, hidden=8, router=ExpertChoice(top_k=2))
    plain, ahead = [GOOD, GOOD.replace(feed_forward=Experts(experts=4, hidden=8))], GOOD.replace(feed_forward=choosing)
    assert notes(model_spec(*plain)) == []
    (line,) = notes(model_spec(*plain, ahead, ahead))
    assert line.startswith("expert_choice (layers 2, 3) looks at all tokens of a call")
