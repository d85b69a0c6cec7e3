"""Axis 2, KV: what is projected, cached and shared? Position codes live here too, because they are part of a key."""

from typing import Annotated

from pydantic import Field

from sextant.axes.kv.base import KV
from sextant.axes.kv.gqa import GQA
from sextant.axes.kv.mla import MLA
from sextant.axes.kv.position import (
    ALiBi,
    AnyPosition,
    AnyScaling,
    LinearScaling,
    Llama3Scaling,
    NoPE,
    RoPE,
    YaRNScaling,
)
from sextant.axes.stability import RMSNorm
from sextant.core.table import Row, Table

AnyKV = Annotated[GQA | MLA, Field(discriminator="kind")]

TABLE = Table(
    "kv",
    "what is projected, cached and shared?",
    (
        Row(
            GQA,
            "H query heads over G cached heads; MHA and MQA are its ends",
            "2305.13245; MAI-Base-1, section 4.4",
            (
                GQA(heads=4, kv_heads=2, head_dim=8),
                GQA(heads=3, kv_heads=3, head_dim=8, bias=True),
                GQA(heads=4, kv_heads=1, head_dim=6, scale=0.3, v_head_dim=5),
                GQA(heads=6, kv_heads=2, head_dim=8, qk_norm=RMSNorm()),
                GQA(heads=4, kv_heads=2, head_dim=6, qk_norm=RMSNorm(), qk_norm_over="all", clip=0.5),
            ),
        ),
        Row(
            MLA,
            "one latent row per token for all heads, and a shared rotary key",
            "2405.04434; 2412.19437",
            (
                MLA(heads=4, rank=12, nope_dim=2, rope_dim=4, v_dim=3, q_rank=7),
                MLA(heads=3, rank=6, nope_dim=4, rope_dim=4, v_dim=7, bias=True, position=RoPE(base=500.0)),
            ),
        ),
    ),
)

POSITIONS = Table(
    "positions",
    "how does a score know about distance?",
    (
        Row(
            RoPE,
            "pairs of channels turn with the position",
            "2104.09864",
            (
                RoPE(),
                RoPE(fraction=0.5),
                RoPE(layout="interleaved"),
                RoPE(fraction=0.25, layout="interleaved", base=500.0),
                RoPE(scaling=LinearScaling(factor=4.0)),
                RoPE(scaling=Llama3Scaling(factor=8.0, original=16)),
                RoPE(scaling=YaRNScaling(factor=4.0, original=16)),
            ),
        ),
        Row(NoPE, "order through causality only", "2305.19466; MAI-Base-1, section 4.3", (NoPE(),)),
        Row(ALiBi, "a slope per head on the distance", "2108.12409", (ALiBi(),)),
    ),
)

__all__ = [
    "GQA", "KV", "MLA", "POSITIONS", "TABLE", "ALiBi", "AnyKV", "AnyPosition", "AnyScaling", "LinearScaling",
    "Llama3Scaling", "NoPE", "RoPE", "YaRNScaling",
]
