"""What keeps the load even: losses on a layer's :class:`~sextant.axes.routing.base.Routing`, added outside forward."""

from typing import Annotated

from pydantic import Field

from sextant.axes.routing.balance.auxiliary import Auxiliary
from sextant.axes.routing.balance.z import ZLoss
from sextant.core.table import Row, Table

AnyBalance = Annotated[Auxiliary | ZLoss, Field(discriminator="kind")]

TABLE = Table(
    "balance",
    "what keeps the load even?",
    (
        Row(
            Auxiliary,
            "share of tokens times mean probability, over a micro-batch, each sequence or the global batch",
            "2006.16668; 2101.03961; global batch 2501.11873 and MAI-Base-1, section 9",
            (Auxiliary(scope="micro_batch"), Auxiliary(scope="sequence"), Auxiliary(scope="global_batch")),
        ),
        Row(ZLoss, "square of the logits' log-sum-exp", "2202.08906", (ZLoss(),)),
    ),
)

__all__ = ["TABLE", "AnyBalance", "Auxiliary", "ZLoss"]
