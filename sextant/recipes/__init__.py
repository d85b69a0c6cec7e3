"""Published systems as working recipes; nothing else in the project knows a system's name."""

from __future__ import annotations

from functools import partial

from sextant.core.errors import UsageError, nearest
from sextant.recipes import (
    bigbird,
    dbrx,
    deepseek_moe_16b,
    deepseek_v2,
    deepseek_v3,
    gemma_3,
    glam,
    gpt_oss,
    gshard,
    infllm,
    infllm_v2_8b,
    llama_3_8b,
    longformer,
    mai_base_1,
    minimax_text_01,
    mistral_7b,
    mixtral_8x7b,
    moa,
    moba_llama_8b,
    nano,
    nsa_27b,
    seer_attention,
    shazeer_2017,
    sparse_transformer,
    switch_base,
)
from sextant.recipes.base import Recipe
from sextant.train.run import Run

__all__ = ["RECIPES", "Recipe", "Run", "get", "names"]

_MAI = "MAI-Thinking-1 report, June 2026"

RECIPES: tuple[Recipe, ...] = (
    Recipe("nano", "the smallest: windows and one full layer", "ours", nano.nano, nano.nano),
    Recipe("dense-150m", "dense control for one GPU", "ours", nano.dense_150m, nano.dense_150m),
    Recipe("moe-400m-a100m", "MAI-Base-1's choices for one GPU", "ours", nano.moe_400m, nano.moe_400m),
    Recipe(
        "mai-base-1", "5 local : 1 global, LatentMoE 8 of 512, attention off at start", _MAI, mai_base_1.paper,
        mai_base_1.twin,
    ),
    *(
        Recipe(
            f"mai-base-1-l{depth}", f"its depth ladder at {depth} layers", _MAI, partial(mai_base_1.ladder, depth),
            partial(mai_base_1.twin_at, depth),
        )
        for depth in mai_base_1.DEPTHS[:-1]
    ),
    Recipe("mistral-7b", "sliding window of 4,096 in every layer", "2310.06825", mistral_7b.paper, mistral_7b.twin),
    Recipe("mixtral-8x7b", "8 experts, 2 met", "2401.04088", mixtral_8x7b.paper, mixtral_8x7b.twin),
    Recipe("gemma-3-1b", "5 local : 1 global, dual rotary base", "2503.19786", gemma_3.paper_1b, gemma_3.twin),
    Recipe("gemma-3-4b", "5 local : 1 global, dual rotary base", "2503.19786", gemma_3.paper_4b, gemma_3.twin),
    Recipe("gemma-3-12b", "5 local : 1 global, dual rotary base", "2503.19786", gemma_3.paper_12b, gemma_3.twin),
    Recipe("gemma-3-27b", "5 local : 1 global, dual rotary base", "2503.19786", gemma_3.paper_27b, gemma_3.twin),
    Recipe(
        "moba-llama-8b", "blocks chosen by their mean key, last 3 layers full, 1 M tokens", "2502.13189",
        moba_llama_8b.paper, moba_llama_8b.twin,
    ),
    Recipe(
        "shazeer-2017", "noisy top-k: 4 of 256 experts, balanced by their variation", "1701.06538",
        shazeer_2017.paper, shazeer_2017.twin,
    ),
    Recipe(
        "gshard", "2 of 2,048 experts, the second at random, capacity with drops", "2006.16668", gshard.paper,
        gshard.twin,
    ),
    Recipe(
        "switch-base", "1 of 128 experts in every second layer, capacity with drops", "2101.03961", switch_base.paper,
        switch_base.twin,
    ),
    Recipe("glam", "2 of 64 experts in every second layer", "2112.06905", glam.paper, glam.twin),
    Recipe("dbrx", "4 of 16 experts, clipped projections", "DBRX, March 2024", dbrx.paper, dbrx.twin),
    Recipe(
        "deepseek-moe-16b", "6 of 64 fine experts and 2 shared", "2401.06066", deepseek_moe_16b.paper,
        deepseek_moe_16b.twin,
    ),
    Recipe(
        "deepseek-v2-lite", "latent attention, 6 of 64 fine experts and 2 shared", "2405.04434",
        deepseek_v2.paper_lite, deepseek_v2.twin_lite,
    ),
    Recipe(
        "deepseek-v2", "latent attention, 6 of 160 fine experts on 3 of 8 devices and 2 shared", "2405.04434",
        deepseek_v2.paper, deepseek_v2.twin,
    ),
    Recipe(
        "deepseek-v3", "latent attention, 8 of 256 fine experts by a bias and 1 shared, MTP", "2412.19437",
        deepseek_v3.paper, deepseek_v3.twin,
    ),
    Recipe(
        "gpt-oss-20b", "window 128 and full in turn, learned sinks, 4 of 32 experts", "gpt-oss, August 2025",
        gpt_oss.paper, gpt_oss.twin,
    ),
    Recipe(
        "longformer", "window of 512, gaps in two heads, a global token", "2004.05150", longformer.paper,
        longformer.twin,
    ),
    Recipe("bigbird", "near, first and random blocks of 64", "2007.14062", bigbird.paper, bigbird.twin),
    Recipe(
        "sparse-transformer", "own block of 128 and 32 columns of every past one", "1904.10509",
        sparse_transformer.paper, sparse_transformer.twin,
    ),
    Recipe("moa", "a span for every head, growing with the length", "2406.14909", moa.paper, moa.twin),
    Recipe(
        "nsa-27b", "compressed keys, chosen blocks and a window, gated; 6 of 72 experts", "2502.11089", nsa_27b.paper,
        nsa_27b.twin,
    ),
    Recipe(
        "infllm-v2-8b", "dense while short, then 96 blocks chosen by pooled keys", "2509.24663", infllm_v2_8b.paper,
        infllm_v2_8b.twin,
    ),
    Recipe(
        "minimax-text-01", "7 lightning layers : 1 softmax, 2 of 32 experts", "2501.08313", minimax_text_01.paper,
        minimax_text_01.twin,
    ),
    Recipe(
        "infllm", "window, sinks and a memory of blocks; 1 M tokens without training", "2402.04617", infllm.paper,
        infllm.twin,
    ),
    Recipe(
        "seer-attention", "gates per head, learnt from full attention of a frozen model, for prompts", "2410.13276",
        seer_attention.paper, seer_attention.twin,
    ),
    Recipe(
        "seer-attention-r", "gates per KV group, learnt from full attention of a frozen model, for decoding",
        "2506.08889", seer_attention.paper_r, seer_attention.twin_r,
    ),
    Recipe("llama-3-8b", "the dense control: full attention", "2407.21783", llama_3_8b.paper, llama_3_8b.twin),
)


def names() -> list[str]:
    """Names of all recipes."""
    return [recipe.name for recipe in RECIPES]


def get(name: str) -> Recipe:
    """The recipe with this name.

    Raises:
        UsageError: no such recipe; the nearest name is offered.
    """
    for recipe in RECIPES:
        if recipe.name == name:
            return recipe
    raise UsageError("no such recipe", got=name, fix=nearest(name, names()))
