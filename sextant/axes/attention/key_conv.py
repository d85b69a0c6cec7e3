"""Key-conv: a short causal convolution lets a key gather its neighbours before blocks are averaged (2511.11571).

``k' = k + silu(conv(k))``, depthwise, on keys before their position code: after it, the neighbours of a key would be
turned by other angles and scores would no longer depend on distances alone. Rotation is linear, so only the added part
is turned. Taps start at zero, where the layer is the identity and a trained model is not disturbed (spec
sparse-attention 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sextant.axes.kv import GQA
from sextant.axes.kv.base import Heads
from sextant.core.state import RowState
from sextant.core.stream import Stream


class KeyConv(nn.Module):
    """Adds to every key what the convolution makes of it and of the ``taps - 1`` keys before it in its sequence.

    The last column of ``taps_GKW`` weighs the key itself. A decoding state keeps the last ``taps - 1`` plain keys.
    """

    def __init__(self, kv: GQA, taps: int):
        super().__init__()
        heads, groups, k_dim, _ = kv.shape
        self.taps_GKW = nn.Parameter(torch.zeros(groups, k_dim, taps))
        self.position = kv.position.build(heads, k_dim)

    def forward(self, heads: Heads, stream: Stream, past: RowState | None) -> Heads:
        """The same heads with richer keys; ``past`` takes this step's plain keys in."""
        if heads.plain_k_TGK is None:
            raise ValueError("key_conv works on keys before their position code")
        plain_TGK = heads.plain_k_TGK.to(heads.v_TGV.dtype)
        added = [F.silu(self._convolved(rows)) for rows in self._with_past(plain_TGK, stream, past)]
        added_TGK = torch.cat(added) if added else plain_TGK
        _, turned_TGK = self.position(added_TGK[:, :0], added_TGK, stream)
        k_TGK = heads.k_TGK + turned_TGK.to(heads.k_TGK.dtype)
        return replace(heads, k_TGK=k_TGK, plain_k_TGK=plain_TGK + added_TGK)

    def _with_past(self, plain_TGK: Tensor, stream: Stream, past: RowState | None) -> Iterator[Tensor]:
        """Keys of each sequence behind the ``taps - 1`` before them, zeros where its beginning leaves none."""
        if past is not None:
            past.append(plain_TGK, plain_TGK, stream)
        for b, own in enumerate(plain_TGK.split(stream.lengths)):
            if not len(own):
                continue
            need = len(own) + self.taps_GKW.shape[2] - 1
            rows = own if past is None else past.sequence(b)[0][-need:]
            yield F.pad(rows, (0, 0, 0, 0, need - len(rows), 0))

    def _convolved(self, rows_SGK: Tensor) -> Tensor:
        taps = self.taps_GKW.to(rows_SGK.dtype).unbind(2)
        tokens = len(rows_SGK) - len(taps) + 1
        return sum((rows_SGK[at : at + tokens] * tap for at, tap in enumerate(taps)), torch.zeros_like(rows_SGK[:1]))
