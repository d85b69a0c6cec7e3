"""Axis 4, routing: who goes where, and what happens when an expert is full?"""

from sextant.axes.routing.balance import TABLE as BALANCE
from sextant.axes.routing.balance import AnyBalance, Auxiliary, ZLoss
from sextant.axes.routing.base import Overflow, Router, RouterModule, Routing, Stack, Usage
from sextant.axes.routing.overflow import TABLE as OVERFLOW
from sextant.axes.routing.overflow import AnyOverflow, Dropless
from sextant.axes.routing.softmax_topk import SoftmaxTopK
from sextant.core.table import Row, Table

AnyRouter = SoftmaxTopK

TABLE = Table(
    "routing",
    "who goes where?",
    (
        Row(
            SoftmaxTopK,
            "softmax over all experts, the A best; gates raw or normalised",
            "Mixtral 2401.04088; MAI-Base-1, section 6",
            (SoftmaxTopK(top_k=2), SoftmaxTopK(top_k=1), SoftmaxTopK(top_k=2, normalize=True, scale=2.5)),
        ),
    ),
)

__all__ = [
    "BALANCE", "OVERFLOW", "TABLE", "AnyBalance", "AnyOverflow", "AnyRouter", "Auxiliary", "Dropless", "Overflow",
    "Router", "RouterModule", "Routing", "SoftmaxTopK", "Stack", "Usage", "ZLoss",
]
