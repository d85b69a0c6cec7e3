"""What a layer remembers while decoding, declared once for the budget, the simple state here, and the serving pools.

A pattern says how long things are kept, the KV option says how wide a row is; together they are a :class:`StateSpec`:
rows per token (kept all, or as a ring), rows per finished block, one recurrent state per sequence, or several of these.
Contract, tested for every row of the attention table: prefill = chunked prefill = decode = packed with neighbours, and
a state that was rolled back or forked goes on as if nothing had happened.
"""

from sextant.core.state.base import LayerState, StateSpec
from sextant.core.state.blocks import BlockSpec, BlockState
from sextant.core.state.joint import JointSpec, JointState
from sextant.core.state.memory import Memory
from sextant.core.state.recurrent import Fold, RecurrentSpec, RecurrentState
from sextant.core.state.rows import Keys, RowSpec, RowState, Slots

__all__ = [
    "BlockSpec", "BlockState", "Fold", "JointSpec", "JointState", "Keys", "LayerState", "Memory",
    "RecurrentSpec", "RecurrentState", "RowSpec", "RowState", "Slots", "StateSpec",
]
