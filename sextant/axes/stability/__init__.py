"""Axis 5, stability: how does the network start and stay calm?"""

from sextant.axes.stability.init import (
    AnyInit,
    DeepNormInit,
    DepthScaledInit,
    InitTable,
    MuPInit,
    NormalInit,
    initialise,
    table,
)
from sextant.axes.stability.linear import (
    Embedding,
    Joined,
    Joins,
    Linear,
    Role,
    Values,
    hidden_matrices,
    roles,
)
from sextant.axes.stability.norm import AnyNorm, LayerNorm, RMSNorm
from sextant.axes.stability.residual import (
    AnyResidual,
    DeepNorm,
    LayerScale,
    PostNorm,
    PreNorm,
    ReZero,
    SandwichNorm,
    SkipInit,
)
from sextant.core.table import Row, Table

NORMS = Table(
    "norms",
    "what keeps activations in range?",
    (
        Row(RMSNorm, "divide by the root mean square", "1910.07467", (RMSNorm(), RMSNorm(unit_offset=True))),
        Row(LayerNorm, "remove mean and variance", "1607.06450", (LayerNorm(), LayerNorm(bias=False))),
    ),
)

TABLE = Table(
    "stability",
    "how does the network start and stay calm?",
    (
        Row(PreNorm, "norm before each sublayer", "GPT-2; Llama", (PreNorm(), PreNorm(norm=LayerNorm()))),
        Row(PostNorm, "norm after each residual sum", "1706.03762", (PostNorm(),)),
        Row(
            DeepNorm,
            "norm before each sublayer, on the residual path too, which a factor above 1 favours",
            "2501.08313, section 4.2; 2203.00555",
            (DeepNorm(alpha=1.7), DeepNorm(beta=0.5), DeepNorm(alpha=2.0, norm=LayerNorm())),
        ),
        Row(
            SandwichNorm,
            "norm before and after each sublayer; gain of the attention's output may start at 0",
            "MAI-Base-1, section 3; Gemma 3",
            (SandwichNorm(), SandwichNorm(attention_gain=0.0), SandwichNorm(norm=RMSNorm(unit_offset=True))),
        ),
        Row(ReZero, "no norm; a scalar per layer that starts at 0", "2003.04887", (ReZero(),)),
        Row(
            SkipInit, "no norm; a scalar per branch that starts at 0 or 1/sqrt(2 L)", "2002.10444",
            (SkipInit(), SkipInit.at_depth(8)),
        ),
        Row(
            LayerScale, "norm before each sublayer; a small number per channel after it", "2103.17239",
            (LayerScale(), LayerScale.at_depth(24, norm=LayerNorm())),
        ),
    ),
)

INITS = Table(
    "inits",
    "how do matrices start?",
    (
        Row(NormalInit, "one standard deviation for all", "MAI-Base-1; Mixtral", (NormalInit(),)),
        Row(DepthScaledInit, "writers to the residual stream by 1/sqrt(2 L)", "GPT-2", (DepthScaledInit(),)),
        Row(
            DeepNormInit, "Xavier; feed-forward, values and attention's output by (8 L)^(-1/4)", "2203.00555",
            (DeepNormInit(),),
        ),
        Row(
            MuPInit, "variance and rate over the width, so that a small model's settings carry over", "2203.03466",
            (MuPInit(base_width=32), MuPInit(base_width=8, base_head_dim=4, head_std=0.0)),
        ),
    ),
)

__all__ = [
    "INITS", "NORMS", "TABLE", "AnyInit", "AnyNorm", "AnyResidual", "DeepNorm", "DeepNormInit", "DepthScaledInit",
    "Embedding", "InitTable", "Joined", "Joins", "LayerNorm", "LayerScale", "Linear", "MuPInit", "NormalInit",
    "PostNorm", "PreNorm", "RMSNorm", "ReZero", "Role", "SandwichNorm", "SkipInit", "Values", "hidden_matrices",
    "initialise", "roles", "table",
]
