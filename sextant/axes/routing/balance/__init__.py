"""What keeps the load even: losses on a layer's routing, or a bias moved between steps; never inside forward."""

from typing import Annotated

from pydantic import Field

from sextant.axes.routing.balance.auxiliary import Auxiliary
from sextant.axes.routing.balance.base import BalanceLoss, BalanceTerm, BalanceUpdate
from sextant.axes.routing.balance.bias import Bias
from sextant.axes.routing.balance.communication import Communication
from sextant.axes.routing.balance.device import Device
from sextant.axes.routing.balance.importance import Importance
from sextant.axes.routing.balance.load import SmoothLoad
from sextant.axes.routing.balance.z import ZLoss
from sextant.core.table import Row, Table

AnyBalance = Annotated[
    Auxiliary | Device | Communication | Importance | SmoothLoad | ZLoss | Bias, Field(discriminator="kind")
]

TABLE = Table(
    "balance",
    "what keeps the load even?",
    (
        Row(
            Auxiliary,
            "share of tokens times mean probability, over a micro-batch, each sequence or the global batch",
            "2006.16668; 2101.03961; global batch 2501.11873 and MAI-Base-1, section 9",
            (
                Auxiliary(scope="micro_batch"), Auxiliary(scope="sequence"), Auxiliary(scope="global_batch"),
                Auxiliary(scope="running"), Auxiliary(counts="first"), Auxiliary(counts="unbiased", scope="sequence"),
            ),
        ),
        Row(
            Device,
            "the same over groups of experts that share a device",
            "2401.06066; 2405.04434, section 2.2.3",
            (Device(devices=2), Device(devices=3, scope="sequence"), Device(devices=2, scope="global_batch")),
        ),
        Row(
            Communication,
            "share of tokens that travel to a device, times its probability",
            "2405.04434, section 2.2.3",
            (
                Communication(devices=3, limit=2), Communication(devices=2, limit=2, scope="sequence"),
                Communication(devices=3, limit=2, scope="global_batch"),
            ),
        ),
        Row(
            Importance,
            "squared variation of the experts' sums of gates",
            "1701.06538, equation 7",
            (Importance(), Importance(scope="global_batch")),
        ),
        Row(
            SmoothLoad,
            "squared variation of the smooth load of a noisy router",
            "1701.06538, equation 11",
            (SmoothLoad(), SmoothLoad(scope="global_batch")),
        ),
        Row(ZLoss, "square of the logits' log-sum-exp", "2202.08906", (ZLoss(),)),
        Row(
            Bias,
            "no loss: a bias on the choice, moved against the load after each step",
            "2408.15664; DeepSeek-V3, section 2.3",
            (Bias(), Bias(rate=0.01, rule="proportional"), Bias(until=0.5)),
        ),
    ),
)

__all__ = [
    "TABLE", "AnyBalance", "Auxiliary", "BalanceLoss", "BalanceTerm", "BalanceUpdate", "Bias", "Communication",
    "Device", "Importance", "SmoothLoad", "ZLoss",
]
