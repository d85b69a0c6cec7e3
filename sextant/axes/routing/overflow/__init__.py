"""What happens when an expert is full? One file per rule: which copies it takes, and how their rows are laid out."""

from typing import Annotated

from pydantic import Field

from sextant.axes.routing.overflow.block_padded import BlockPadded
from sextant.axes.routing.overflow.capacity import Capacity
from sextant.axes.routing.overflow.device_capacity import DeviceCapacity
from sextant.axes.routing.overflow.dropless import Dropless
from sextant.axes.routing.overflow.dynamic import Dynamic
from sextant.axes.routing.overflow.pooled import Pooled
from sextant.axes.routing.overflow.rounds import CappedRounds
from sextant.core.table import Row, Table

AnyOverflow = Annotated[
    Dropless | Capacity | Pooled | DeviceCapacity | Dynamic | BlockPadded | CappedRounds, Field(discriminator="kind")
]

TABLE = Table(
    "overflow",
    "what happens when an expert is full?",
    (
        Row(
            Dropless,
            "it takes all that is sent",
            "2211.15841; MAI-Base-1, section 8",
            (Dropless(), Dropless(tile=4)),
        ),
        Row(
            Capacity,
            "places per expert and group; late copies are dropped",
            "GShard 2006.16668, Switch 2101.03961, V-MoE 2106.05974, DeepSpeed-MoE 2201.05596",
            (
                Capacity(),
                Capacity(factor=1.0, eval_factor=2.0, order="position", group="sequence"),
                Capacity(factor=0.7, minimum=2, order="score"),
                Capacity(order="affinity", group="sequence"),
                Capacity(order="random"),
            ),
        ),
        Row(
            Pooled,
            "groups of devices share their places",
            "MiniMax-01, section 5.3",
            (Pooled(groups=2), Pooled(factor=1.0, groups=3, eval_factor=1.0)),
        ),
        Row(
            DeviceCapacity,
            "places per device; the lowest affinity is dropped, some sequences never are",
            "DeepSeek-V2 2405.04434, section 2.2.4",
            (DeviceCapacity(devices=1), DeviceCapacity(devices=1, factor=0.5, exempt=0.5, eval_factor=0.8)),
        ),
        Row(
            Dynamic,
            "all shares filled up to the largest, or to a limit",
            "Tutel 2206.03382",
            (Dynamic(), Dynamic(factor=0.8, order="score")),
        ),
        Row(BlockPadded, "each share filled up to whole blocks", "MegaBlocks 2211.15841", (BlockPadded(block=4),)),
        Row(
            CappedRounds,
            "it takes all, in rounds of a capped size",
            "MAI-Base-1, section 8.4",
            (CappedRounds(cap=8, tile=4), CappedRounds(cap=5, tile=1)),
        ),
    ),
)

__all__ = [
    "TABLE", "AnyOverflow", "BlockPadded", "Capacity", "CappedRounds", "DeviceCapacity", "Dropless", "Dynamic",
    "Pooled",
]
