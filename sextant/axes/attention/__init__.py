"""Axis 1, attention: which keys does a query read?"""

from typing import Annotated

from pydantic import Field

from sextant.axes.attention.base import Mixer, Pattern, Selection
from sextant.axes.attention.bigbird import BigBird
from sextant.axes.attention.block_local import BlockLocal
from sextant.axes.attention.dilated import Dilated
from sextant.axes.attention.dsa import DSA
from sextant.axes.attention.fixed import Fixed
from sextant.axes.attention.full import Full
from sextant.axes.attention.gated_delta import GatedDelta
from sextant.axes.attention.gla import GLA
from sextant.axes.attention.infllm import InfLLM
from sextant.axes.attention.infllm_v2 import InfLLMV2
from sextant.axes.attention.kda import KDA
from sextant.axes.attention.lightning import Lightning
from sextant.axes.attention.longformer import Longformer
from sextant.axes.attention.moa import MoA
from sextant.axes.attention.moba import MoBA
from sextant.axes.attention.nsa import NSA, MeanPhi, MLPPhi
from sextant.axes.attention.retnet import RetNet
from sextant.axes.attention.seer import Budget, Density, Seer, SeerR, Threshold
from sextant.axes.attention.sink import LearnedSink
from sextant.axes.attention.strided import Strided
from sextant.axes.attention.window import Window
from sextant.axes.kv.position import NoPE
from sextant.axes.stability import RMSNorm
from sextant.core.table import Row, Table

Static = Full | Window | Dilated | BlockLocal | Strided | Fixed | Longformer | BigBird | MoA | LearnedSink
Linear = Lightning | RetNet | GLA | GatedDelta | KDA
Chosen = MoBA | NSA | InfLLMV2 | DSA | Seer | SeerR | InfLLM
AnyAttention = Annotated[Static | Chosen | Linear, Field(discriminator="kind")]

TABLE = Table(
    "attention",
    "which keys does a query read?",
    (
        Row(Full, "every earlier key", "1706.03762", (Full(),)),
        Row(
            Window,
            "the last W keys, and the first few as sinks",
            "2004.05150; 2310.06825; sinks 2309.17453",
            (Window(window=4), Window(window=1), Window(window=3, sinks=2), Window(window=64)),
        ),
        Row(
            Dilated,
            "W keys of the past, some tokens apart",
            "2004.05150, section 3.1",
            (Dilated(window=3, dilation=2), Dilated(window=2, dilation=5), Dilated(window=4, dilation=1)),
        ),
        Row(
            BlockLocal,
            "the query's own block up to itself",
            "2502.13189 with top_k 1; 1904.10509",
            (BlockLocal(block=4), BlockLocal(block=1), BlockLocal(block=5)),
        ),
        Row(
            Strided,
            "the last few keys, and every stride-th of the past",
            "1904.10509, section 4.2",
            (Strided(stride=3, heads="merged"), Strided(stride=3), Strided(stride=1)),
        ),
        Row(
            Fixed,
            "the own block, and the last columns of every past block",
            "1904.10509, section 4.2",
            (
                Fixed(block=4, columns=2, heads="merged", subblocks="distinct"),
                Fixed(block=3, columns=1),
                Fixed(block=4, columns=2, heads="merged"),
            ),
        ),
        Row(
            Longformer,
            "a window, wider with gaps in some heads, and the first tokens",
            "2004.05150",
            (
                Longformer(window=3, global_tokens=2),
                Longformer(window=3, global_tokens=1, dilation=2, dilated=1),
                Longformer(window=2, dilation=3, dilated=2),
            ),
        ),
        Row(
            BigBird,
            "near, first and random blocks",
            "2007.14062",
            (
                BigBird(block=2, window=1, global_blocks=1, random=1),
                BigBird(block=1, window=2, global_blocks=0, random=2, seed=7),
                BigBird(block=3, window=2, global_blocks=1, random=0),
            ),
        ),
        Row(
            MoA,
            "a span for every KV head, growing with the length",
            "2406.14909",
            (
                MoA(alpha=(2, 1), beta=(0.0, 0.4), sinks=1, block=1),
                MoA(alpha=(2, 3), beta=(0.2, 0.0), sinks=2, block=2, length=20),
                MoA(alpha=(4, 4), beta=(0.1, 0.1), sinks=0, block=3, length=11),
            ),
        ),
        Row(
            LearnedSink,
            "all keys or the last W, and a learned logit per head for none of them",
            "gpt-oss",
            (LearnedSink(), LearnedSink(window=4), LearnedSink(window=1)),
        ),
        Row(
            MoBA,
            "the current block and the past blocks with the likeliest mean key",
            "2502.13189",
            (
                MoBA(block=3, top_k=2),
                MoBA(block=2, top_k=3, per="group"),
                MoBA(block=4, top_k=1),
                MoBA(block=2, top_k=3, previous=1, min_len=7, key_conv=3),
                MoBA(block=512, top_k=2, decode="dense"),  # so long that dense and sparse decoding agree
            ),
        ),
        Row(
            NSA,
            "compressed keys, the blocks that they point to, and a window, gated",
            "2502.11089",
            (
                NSA(length=4, stride=2, block=4, top_k=3, initial=1, local=1, window=3, phi=MLPPhi(hidden=5)),
                NSA(
                    length=2, stride=2, block=2, top_k=4, initial=1, local=2, window=2, phi=MeanPhi(), gates="token",
                    separate_kv=False, cmp_rope="post",
                ),
                NSA(
                    length=4, stride=2, block=4, top_k=2, initial=0, local=2, window=5, phi=MLPPhi(hidden=4),
                    separate_kv=False, cmp_rope="none",
                ),
                NSA(length=2, stride=1, block=3, top_k=3, local=1, window=2, phi=MeanPhi(), cmp_rope="post"),
            ),
        ),
        Row(
            InfLLMV2,
            "blocks chosen by pooled keys and a window of blocks, one softmax, dense while short",
            "2509.24663",
            (
                InfLLMV2(length=4, stride=2, block=4, top_k=1, window=4, dense_len=0),
                InfLLMV2(length=2, stride=1, block=2, top_k=2, initial=0, window=4, dense_len=7),
            ),
        ),
        Row(
            DSA,
            "the tokens that a small trained indexer scores highest, for all heads",
            "DeepSeek-V3.2; blocks: MiniMax-M3",
            (
                DSA(top_k=4, heads=3, head_dim=6, rope_dim=4),
                DSA(top_k=3, heads=2, head_dim=5, block=2),
                DSA(top_k=2, heads=2, head_dim=4, rope_dim=4, stage="dense"),
            ),
        ),
        Row(
            InfLLM,
            "sinks, a window, and far blocks found by their most attended keys; not trained",
            "2402.04617",
            (
                InfLLM(block=2, sinks=2, window=4, top_k=2, representatives=1, per="all"),
                InfLLM(block=3, sinks=0, window=3, top_k=1, representatives=2, per="head"),
                InfLLM(block=2, sinks=4, window=1, top_k=3, representatives=2, per="head"),
            ),
        ),
        Row(
            Seer,
            "blocks chosen by a gate that learns from full attention; one gate per head, for prompts",
            "2410.13276",
            (
                Seer(block=3, pool="none", rule=Budget(tokens=6)),
                Seer(block=2, pool="none", width=4, rule=Threshold(share=0.2)),
                Seer(block=4, pool="none", rule=Density(share=0.5)),
                Seer(block=3, rule=Budget(tokens=4096)),  # reads all: what its pooled queries choose is not causal
            ),
        ),
        Row(
            SeerR,
            "blocks chosen by a gate that learns from full attention; one gate per KV group, for decoding",
            "2506.08889",
            (
                SeerR(block=3, width=6, rule=Budget(tokens=6)),
                SeerR(block=2, width=4, qk_norm=RMSNorm(), rule=Threshold(share=0.25)),
            ),
        ),
        Row(
            Lightning,
            "no keys: a state per head that decays at a fixed rate",
            "2501.08313, section 2.2; 2401.04658",
            (
                Lightning(heads=4, head_dim=6, chunk=4),
                Lightning(heads=3, head_dim=5, fade=0.3, chunk=3, norm=RMSNorm(unit_offset=True)),
                Lightning(heads=2, head_dim=8, fade=1e-5),
            ),
        ),
        Row(
            RetNet,
            "no keys: a state that decays at a fixed rate, queries and keys rotated",
            "2307.08621",
            (
                RetNet(heads=3, head_dim=4, value_dim=8, chunk=4),
                RetNet(heads=2, head_dim=5, value_dim=3, position=NoPE(), chunk=64),
            ),
        ),
        Row(
            GLA,
            "no keys: a state whose channels decay as the token says",
            "2312.06635",
            (
                GLA(heads=2, head_dim=4, value_dim=6, rank=3, chunk=4),
                GLA(heads=3, head_dim=5, value_dim=4, temperature=1.0, chunk=7),
            ),
        ),
        Row(
            GatedDelta,
            "no keys: a state that corrects what it answers to each key, and decays per head",
            "2412.06464; Qwen3-Next",
            (
                GatedDelta(key_heads=2, value_heads=4, head_dim=5, value_dim=4, chunk=4),
                GatedDelta(key_heads=3, value_heads=3, head_dim=4, value_dim=6, taps=2),
            ),
        ),
        Row(
            KDA,
            "no keys: a state that corrects what it answers to each key, and decays per channel",
            "2510.26692",
            (KDA(heads=3, head_dim=5, chunk=4), KDA(heads=2, head_dim=6, taps=3, chunk=7)),
        ),
    ),
)

__all__ = [
    "DSA", "GLA", "KDA", "NSA", "TABLE", "AnyAttention", "BigBird", "BlockLocal", "Dilated", "Fixed", "Full",
    "GatedDelta", "InfLLM", "InfLLMV2", "LearnedSink", "Lightning", "Longformer", "MLPPhi", "MeanPhi", "Mixer", "MoA",
    "MoBA", "Pattern", "RetNet", "Seer", "SeerR", "Selection", "Strided", "Window",
]
