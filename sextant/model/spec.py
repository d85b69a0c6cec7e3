"""A whole model as one declaration: widths, and one explicit :class:`Layer` per layer, written with pattern helpers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from pydantic import Field, model_validator

from sextant.axes.attention import AnyAttention, Full, Mixer, Pattern
from sextant.axes.capacity import AnyFeedForward
from sextant.axes.kv import KV, AnyKV
from sextant.axes.numerics import FP32, Numerics
from sextant.axes.stability import AnyInit, AnyNorm, AnyResidual, NormalInit, PreNorm, RMSNorm
from sextant.core.cost import At, Cost
from sextant.core.errors import UsageError
from sextant.core.spec import Spec
from sextant.core.state import StateSpec
from sextant.model.schedule import scheduled

if TYPE_CHECKING:
    from sextant.model.transformer import Transformer

T = TypeVar("T")


class Layer(Spec):
    """One choice on each of the axes 1, 2, 3 (with 4) and 5; a linear mixer projects itself, without ``kv``."""

    attention: AnyAttention = Full()
    kv: AnyKV | None = None
    feed_forward: AnyFeedForward
    residual: AnyResidual = PreNorm()

    @model_validator(mode="after")
    def _projected_once(self) -> Layer:
        if isinstance(self.attention, Mixer) and self.kv is not None:
            raise ValueError(f"attention {self.attention.kind} has projections of its own: leave kv out")
        if isinstance(self.attention, Pattern) and self.kv is None:
            raise ValueError(f"attention {self.attention.kind} needs kv, such as kind: gqa")
        return self

    @property
    def projections(self) -> KV:
        """The KV option of a layer that attends.

        Raises:
            UsageError: asked of a linear mixer.
        """
        if self.kv is None:
            raise UsageError(f"attention {self.attention.kind} has no kv option")
        return self.kv

    def state(self) -> StateSpec:
        """What this layer remembers while decoding."""
        if isinstance(self.attention, Pattern):
            return self.attention.state(self.projections)
        return self.attention.state()

    def attention_cost(self, width: int, at: At) -> Cost:
        """Projections, scores and state."""
        if isinstance(self.attention, Pattern):
            kv = self.projections
            return kv.cost(width, at) + self.attention.cost(width, kv, at)
        return self.attention.cost(width, at)

    def cost(self, width: int, at: At) -> Cost:
        """Of one layer, norms included."""
        attention = self.attention_cost(width, at)
        return attention + self.feed_forward.cost(width, at) + 2 * self.residual.cost(width, at)


class ModelSpec(Spec):
    """A decoder-only language model.

    Attributes:
        vocab, width: P and D.
        context: the longest sequence it is meant for.
        tied: one matrix for embedding and head.
        embedding_scale: multiplies embedding rows (Gemma: sqrt(D)).
        softcap: logits become ``cap * tanh(logits / cap)``.
        schedule: says what the layers attend with, such as ``(5*window512+1*full)*10``, in place of what they say
            themselves; read once, so it is None in a finished declaration.
    """

    schema_version: Literal[1] = 1
    name: str
    vocab: int = Field(ge=2)
    width: int = Field(ge=1)
    context: int = Field(ge=1)
    layers: tuple[Layer, ...] = Field(min_length=1)
    final_norm: AnyNorm = RMSNorm()
    tied: bool = False
    embedding_scale: float = Field(default=1.0, gt=0)
    softcap: float | None = Field(default=None, gt=0)
    init: AnyInit = NormalInit()
    schedule: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _scheduled(cls, data: Any) -> Any:
        return scheduled(data)

    def build(
        self, numerics: Numerics | None = None, *, device: torch.device | str = "cpu", seed: int = 0
    ) -> Transformer:
        """A model with fresh parameters; ``device="meta"`` gives shapes without memory."""
        from sextant.model.transformer import build

        return build(self, numerics or FP32(), device, seed)

    def states(self) -> list[StateSpec]:
        """Decoding states, layer by layer."""
        return [layer.state() for layer in self.layers]

    def cost(self, at: At) -> Cost:
        """Of the whole model at one operating point; the embedding look-up is free, the head is not."""
        table = self.vocab * self.width
        ends = Cost.of_matrix(self.width, self.vocab, at) + self.final_norm.cost(self.width, at)
        if not self.tied:
            ends += Cost(table, table)
        return sum((layer.cost(self.width, at) for layer in self.layers), start=ends)


def repeat(pattern: Sequence[T], layers: int) -> list[T]:
    """A pattern tiled over the depth: ``repeat(5 * [local] + [global_], 78)``."""
    return list(islice(cycle(pattern), layers))


def stack(layers: int, **columns: Spec | Iterable[Spec]) -> tuple[Layer, ...]:
    """Layers from one column per axis; a single declaration serves every layer."""
    full = {name: [column] * layers if isinstance(column, Spec) else list(column) for name, column in columns.items()}
    return tuple(Layer(**dict(zip(full, row, strict=True))) for row in zip(*full.values(), strict=True))  # type: ignore[arg-type]
