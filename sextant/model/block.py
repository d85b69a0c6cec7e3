"""One layer: attention and feed-forward, each inside the branch that its placement of norms makes."""

from __future__ import annotations

from torch import Tensor, nn

from sextant.axes.numerics import Numerics
from sextant.axes.routing import Routing
from sextant.axes.stability import SandwichNorm
from sextant.core.state import Keys
from sextant.core.stream import Stream
from sextant.model.spec import Layer


class SelfAttention(nn.Module):
    """Project, remember, read, project back. Rows ``[T, D]`` in and out."""

    def __init__(self, spec: Layer, width: int, numerics: Numerics, index: int):
        super().__init__()
        self.index = index
        self.kv = spec.kv.build(width, numerics)
        self.pattern = spec.attention.build(width)

    def forward(self, x_TD: Tensor, stream: Stream) -> tuple[Tensor, None]:
        q_THK, k_TGK, v_TGV = self.kv.project(x_TD, stream)
        if stream.memory is None:
            keys = Keys(k_TGK, v_TGV)
        else:
            keys = stream.memory.layers[self.index].append(k_TGK, v_TGV, stream)
        o_THV = self.pattern(q_THK, keys, x_TD, stream, self.kv.scores)
        return self.kv.output(o_THV), None


class Block(nn.Module):
    """``x_TD -> x_TD``, and the routing of its feed-forward when that is a mixture of experts."""

    def __init__(self, spec: Layer, width: int, numerics: Numerics, index: int):
        super().__init__()
        zero_init = spec.residual.attention_gain if isinstance(spec.residual, SandwichNorm) else 1.0
        self.around_attention = spec.residual.build(width, zero_init)
        self.attention = SelfAttention(spec, width, numerics, index)
        self.around_feed_forward = spec.residual.build(width)
        self.feed_forward = spec.feed_forward.build(width, numerics)

    def forward(self, x_TD: Tensor, stream: Stream) -> tuple[Tensor, Routing | None]:
        x_TD, _ = self.around_attention(x_TD, lambda h_TD: self.attention(h_TD, stream))
        return self.around_feed_forward(x_TD, self.feed_forward)
