"""Axis 3, capacity: where do parameters live?"""

from typing import Annotated

from pydantic import Field

from sextant.axes.capacity.base import FeedForward
from sextant.axes.capacity.dense import Dense
from sextant.axes.capacity.experts import Experts
from sextant.axes.capacity.latent import LatentExperts
from sextant.axes.routing import Auxiliary, SoftmaxTopK
from sextant.core.table import Row, Table

AnyFeedForward = Annotated[Dense | Experts | LatentExperts, Field(discriminator="kind")]

TABLE = Table(
    "capacity",
    "where do parameters live?",
    (
        Row(
            Dense,
            "every token meets every parameter",
            "2002.05202",
            (Dense(hidden=12), Dense(hidden=7, activation="gelu"), Dense(hidden=8, activation="relu2")),
        ),
        Row(
            Experts,
            "E experts of which a token meets A, and shared ones",
            "2401.04088; fine-grained and shared 2401.06066",
            (
                Experts(experts=4, hidden=6),
                Experts(experts=5, hidden=6, router=SoftmaxTopK(top_k=1), activation="gelu", shared=4),
                Experts(experts=3, hidden=4, router=SoftmaxTopK(top_k=3, normalize=True), balance=(Auxiliary(),)),
            ),
        ),
        Row(
            LatentExperts,
            "experts inside a compressed width",
            "2601.18089; MAI-Base-1, section 7",
            (
                LatentExperts(experts=4, hidden=6, latent=5),
                LatentExperts(experts=4, hidden=6, latent=5, activation="relu2", shared=4),
            ),
        ),
    ),
)

__all__ = ["TABLE", "AnyFeedForward", "Dense", "Experts", "FeedForward", "LatentExperts"]
