"""Axis 4, routing: who goes where, and what happens when an expert is full?"""

from typing import Annotated

from pydantic import Field

from sextant.axes.routing.balance import TABLE as BALANCE
from sextant.axes.routing.balance import (
    AnyBalance,
    Auxiliary,
    BalanceLoss,
    BalanceTerm,
    BalanceUpdate,
    Bias,
    Communication,
    Device,
    Importance,
    SmoothLoad,
    ZLoss,
)
from sextant.axes.routing.base import Overflow, Router, RouterModule, Routing, Stack, Usage
from sextant.axes.routing.bias import SelectionBias
from sextant.axes.routing.expert_choice import ExpertChoice
from sextant.axes.routing.groups import Groups
from sextant.axes.routing.gshard import GShard
from sextant.axes.routing.noisy_topk import NoisyTopK
from sextant.axes.routing.overflow import TABLE as OVERFLOW
from sextant.axes.routing.overflow import (
    AnyOverflow,
    BlockPadded,
    Capacity,
    CappedRounds,
    DeviceCapacity,
    Dropless,
    Dynamic,
    Pooled,
)
from sextant.axes.routing.sigmoid_topk import SigmoidTopK
from sextant.axes.routing.softmax_topk import SoftmaxTopK
from sextant.axes.routing.switch import Switch
from sextant.core.table import Row, Table

AnyRouter = Annotated[
    SoftmaxTopK | SigmoidTopK | Switch | GShard | NoisyTopK | ExpertChoice, Field(discriminator="kind")
]

TABLE = Table(
    "routing",
    "who goes where?",
    (
        Row(
            SoftmaxTopK,
            "softmax, the A best; gates raw (MAI, DeepSeek-V2) or over their norm (Mixtral, GLaM, DBRX, MiniMax)",
            "Mixtral 2401.04088; MAI-Base-1, section 6; DeepSeek-V2 2405.04434",
            (
                SoftmaxTopK(top_k=2), SoftmaxTopK(top_k=1), SoftmaxTopK(top_k=2, normalize=True, scale=2.5),
                SoftmaxTopK(top_k=3, scale=16.0, groups=Groups(count=4, kept=2)),
                SoftmaxTopK(top_k=2, bias=True, jitter=0.01), SoftmaxTopK(top_k=3, normalize=True, p_norm=2.0),
            ),
        ),
        Row(
            SigmoidTopK,
            "sigmoid affinities, a bias for the choice alone, few groups; gates over their sum (DeepSeek-V3)",
            "2412.19437, section 2.1.2; DeepSeek-V3, section 2.2",
            (
                SigmoidTopK(top_k=2), SigmoidTopK(top_k=2, normalize=False, bias=False),
                SigmoidTopK(top_k=3, scale=2.5, groups=Groups(count=4, kept=2, score="top2")),
            ),
        ),
        Row(
            Switch,
            "one expert, its gate the probability; input shaken while training",
            "2101.03961",
            (Switch(), Switch(jitter=0.0)),
        ),
        Row(
            GShard,
            "two experts with gates that share one; the second met at random while training",
            "2006.16668; MAI-Base-1, section 10.2",
            (GShard(), GShard(second="text"), GShard(second="mesh_tf"), GShard(second="always")),
        ),
        Row(
            NoisyTopK,
            "logits with noise of a learned size while training, softmax over the A best",
            "1701.06538; MAI-Base-1, section 10.2",
            (NoisyTopK(top_k=2), NoisyTopK(top_k=3, floor=0.01)),
        ),
        Row(
            ExpertChoice,
            "each expert takes its share of the tokens; not causal",
            "2202.09368",
            (ExpertChoice(top_k=2), ExpertChoice(top_k=1)),
        ),
    ),
)

__all__ = [
    "BALANCE", "OVERFLOW", "TABLE", "AnyBalance", "AnyOverflow", "AnyRouter", "Auxiliary", "BalanceLoss",
    "BalanceTerm", "BalanceUpdate", "Bias", "BlockPadded", "Capacity", "CappedRounds", "Communication", "Device",
    "DeviceCapacity", "Dropless", "Dynamic", "ExpertChoice", "GShard", "Groups", "Importance", "NoisyTopK",
    "Overflow", "Pooled", "Router", "RouterModule", "Routing", "SelectionBias", "SigmoidTopK", "SmoothLoad",
    "SoftmaxTopK", "Stack", "Switch", "Usage", "ZLoss",
]
