"""A whole model as one declaration: widths, and one explicit :class:`Layer` per layer, written with pattern helpers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from sextant.axes.numerics import FP32, Numerics
from sextant.axes.stability import AnyInit, AnyNorm, NormalInit, RMSNorm
from sextant.core.cost import At, Cost
from sextant.core.spec import Spec
from sextant.core.state import StateSpec
from sextant.model.layer import Layer
from sextant.model.mtp import MTP
from sextant.model.schedule import scheduled

if TYPE_CHECKING:
    from sextant.model.transformer import Transformer

__all__ = ["Layer", "ModelSpec", "repeat", "stack"]

T = TypeVar("T")
LARGEST_SIZE = 2**31 - 1
"""Of every size, count and seed in a model."""


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
        mtp: modules that predict further tokens, in training and as drafts.
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
    mtp: MTP | None = None

    @model_validator(mode="before")
    @classmethod
    def _scheduled(cls, data: Any) -> Any:
        return scheduled(data)

    @model_validator(mode="after")
    def _sizes_fit(self) -> ModelSpec:
        """Sizes multiply, so the bound on them is tighter than what an integer holds."""
        for path, value in self.leaves().items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int) and number > LARGEST_SIZE:
                    context = {"key": path, "got": number, "expected": f"at most {LARGEST_SIZE:,}"}
                    raise PydanticCustomError("too_large_inside", "wrong value", context)
        return self

    def build(
        self, numerics: Numerics | None = None, *, device: torch.device | str = "cpu", seed: int = 0
    ) -> Transformer:
        """A model with fresh parameters; ``device="meta"`` gives shapes without memory."""
        from sextant.model.transformer import build

        return build(self, numerics or FP32(), device, seed)

    @property
    def mtp_layers(self) -> tuple[Layer, ...]:
        """The layer of each prediction module; none without any."""
        return () if self.mtp is None else self.mtp.depth * (self.mtp.layer or self.layers[-1],)

    @property
    def all_layers(self) -> tuple[Layer, ...]:
        """Layers by the index that records of them carry: module ``k`` (from 1) has ``len(layers) + k - 1``."""
        return self.layers + self.mtp_layers

    def states(self) -> list[StateSpec]:
        """Decoding states, layer by layer; a prediction module has its own, ``mtp_layers[k].state()``."""
        return [layer.state() for layer in self.layers]

    def cost(self, at: At) -> Cost:
        """Of the model that predicts the next token, without prediction modules, as V3's 671 B are counted.

        The embedding look-up is free, the head is not.
        """
        table = self.vocab * self.width
        ends = Cost.of_matrix(self.width, self.vocab, at) + self.final_norm.cost(self.width, at)
        if not self.tied:
            ends += Cost(table, table)
        return sum((layer.cost(self.width, at) for layer in self.layers), start=ends)

    def mtp_cost(self, at: At) -> Cost:
        """What the prediction modules add where they run; embedding and head are shared, so no parameters of theirs."""
        if self.mtp is None:
            return Cost()
        head = Cost.of_matrix(self.width, self.vocab, at)
        again = Cost(flops=head.flops, activation_bytes=head.activation_bytes)
        own = (self.mtp.cost(layer, self.final_norm, self.width, at) for layer in self.mtp_layers)
        return sum(own, start=self.mtp.depth * again)

    def training_cost(self, at: At) -> Cost:
        """With the prediction modules: what training runs and a checkpoint stores."""
        return self.cost(at) + self.mtp_cost(at)


def repeat(pattern: Sequence[T], layers: int) -> list[T]:
    """A pattern tiled over the depth: ``repeat(5 * [local] + [global_], 78)``."""
    return list(islice(cycle(pattern), layers))


def stack(layers: int, **columns: Spec | Iterable[Spec]) -> tuple[Layer, ...]:
    """Layers from one column per axis; a single declaration serves every layer."""
    full = {name: [column] * layers if isinstance(column, Spec) else list(column) for name, column in columns.items()}
    return tuple(Layer(**dict(zip(full, row, strict=True))) for row in zip(*full.values(), strict=True))  # type: ignore[arg-type]
