"""Axis 5, stability: how does the network start and stay calm?"""

from sextant.axes.stability.init import AnyInit, DepthScaledInit, NormalInit, initialise
from sextant.axes.stability.linear import Embedding, Joined, Joins, Linear, Role, roles
from sextant.axes.stability.norm import AnyNorm, LayerNorm, RMSNorm
from sextant.axes.stability.residual import AnyResidual, DeepNorm, PostNorm, PreNorm, SandwichNorm
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
    ),
)

INITS = Table(
    "inits",
    "how do matrices start?",
    (
        Row(NormalInit, "one standard deviation for all", "MAI-Base-1; Mixtral", (NormalInit(),)),
        Row(DepthScaledInit, "writers to the residual stream by 1/sqrt(2 L)", "GPT-2", (DepthScaledInit(),)),
    ),
)

__all__ = [
    "INITS", "NORMS", "TABLE", "AnyInit", "AnyNorm", "AnyResidual", "DeepNorm", "DepthScaledInit", "Embedding",
    "Joined", "Joins", "LayerNorm", "Linear", "NormalInit", "PostNorm", "PreNorm", "RMSNorm", "Role",
    "SandwichNorm", "initialise", "roles",
]
