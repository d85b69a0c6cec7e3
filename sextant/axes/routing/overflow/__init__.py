"""What happens when an expert is full? One file per rule; each admits copies and lays out the rows of the experts."""

from sextant.axes.routing.overflow.dropless import Dropless
from sextant.core.table import Row, Table

AnyOverflow = Dropless

TABLE = Table(
    "overflow",
    "what happens when an expert is full?",
    (Row(Dropless, "it takes all that is sent", "2211.15841; MAI-Base-1, section 8", (Dropless(),)),),
)

__all__ = ["TABLE", "AnyOverflow", "Dropless"]
