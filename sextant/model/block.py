"""One layer: attention and feed-forward, each inside the branch that its placement of norms makes."""

from __future__ import annotations

from torch import Tensor, nn

from sextant.axes.attention import Mixer, Pattern
from sextant.axes.attention.base import Selection
from sextant.axes.kv import KV
from sextant.axes.numerics import Numerics
from sextant.axes.routing import Routing
from sextant.core.errors import UsageError
from sextant.core.state import LayerState
from sextant.core.stream import Stream
from sextant.core.trace import Routes
from sextant.model.layer import Layer


class SelfAttention(nn.Module):
    """Project, remember, read, project back. Rows ``[T, D]`` in and out."""

    def __init__(self, pattern: Pattern, kv: KV, width: int, numerics: Numerics, index: int):
        super().__init__()
        self.index = index
        self.kv = kv.build(width, numerics)
        self.pattern = pattern.build(width, kv, numerics)

    def forward(self, x_TD: Tensor, stream: Stream) -> tuple[Tensor, Selection | None]:
        state = state_of(stream, self.index)
        heads = self.kv.project(x_TD, stream, self.pattern.reads_state)
        o_THV, selection = self.pattern(heads, x_TD, stream, self.kv.scores, state, **self._recorded(stream))
        if selection is not None and selection.applied:
            self._refuse_unrecorded(stream)
        return self.kv.output(o_THV, heads), selection

    def _recorded(self, stream: Stream) -> dict[str, Tensor]:
        """The blocks to read, where a record has some for this layer."""
        read = None if stream.replay is None else stream.replay.reads.get(self.index)
        return {} if read is None else {"chosen_THJ": read.blocks_THJ}

    def _refuse_unrecorded(self, stream: Stream) -> None:
        if stream.replay is not None and self.index not in stream.replay.reads:
            what = "the record has no blocks for a layer that selects"
            raise UsageError(what, where=f"layers[{self.index}].attention", got=stream.replay.shape)


class Mixing(nn.Module):
    """A linear mixer in attention's place: it has projections and a state of its own."""

    def __init__(self, mixer: Mixer, width: int, numerics: Numerics, index: int):
        super().__init__()
        self.index = index
        self.mixer = mixer.build(width, numerics)

    def forward(self, x_TD: Tensor, stream: Stream) -> tuple[Tensor, None]:
        return self.mixer(x_TD, stream, state_of(stream, self.index)), None


def state_of(stream: Stream, layer: int) -> LayerState | None:
    """What a layer remembers; None in training."""
    return None if stream.memory is None else stream.memory.layers[layer]


class Block(nn.Module):
    """``x_TD -> x_TD``, with what attention selected and how the feed-forward routed, where they choose at all."""

    def __init__(self, spec: Layer, width: int, numerics: Numerics, index: int):
        super().__init__()
        self.index = index
        around_attention, around_feed_forward = spec.residual.build(width)
        self.around_attention = around_attention
        if isinstance(spec.attention, Pattern):
            self.attention: nn.Module = SelfAttention(spec.attention, spec.projections, width, numerics, index)
        else:
            self.attention = Mixing(spec.attention, width, numerics, index)
        self.around_feed_forward = around_feed_forward
        self.feed_forward = spec.feed_forward.build(width, numerics)

    def forward(self, x_TD: Tensor, stream: Stream) -> tuple[Tensor, Selection | None, Routing | None]:
        x_TD, selection = self.around_attention(x_TD, lambda h_TD: self.attention(h_TD, stream))
        recorded = self._recorded(stream)
        x_TD, routing = self.around_feed_forward(x_TD, lambda h_TD: self.feed_forward(h_TD, stream, *recorded))
        return x_TD, selection, routing

    def _recorded(self, stream: Stream) -> tuple[Routes, ...]:
        """Which experts to go to, where a record has some for this layer."""
        routes = None if stream.replay is None else stream.replay.routes.get(self.index)
        return () if routes is None else (routes,)
