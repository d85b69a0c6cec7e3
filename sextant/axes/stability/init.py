"""How parameters start: one table, matrix -> standard deviation and rates, for each scheme.

:func:`initialise` draws by it, the optimiser takes its rates from it, and ``audit`` measures a model against it. Gains,
biases and scales are set rather than drawn: by the ``fill`` of the module that has them, and by its branch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sextant.axes.stability.linear import Role, Values, roles
from sextant.axes.stability.residual import Branch
from sextant.core.spec import Spec

OUTWARD = (Role.ATTENTION_OUT, Role.FF_OUT)
"""Matrices that write to the residual stream."""
SET = (Role.GAIN, Role.BIAS)
"""What is set, not drawn."""


@dataclass(frozen=True)
class Matrix:
    """What a scheme may ask about a matrix.

    Attributes:
        inputs, outputs: its fans; of one of the equal matrices where several lie side by side.
        values: it makes attention's values.
        width, layers: D and L of the model.
    """

    role: Role
    inputs: int
    outputs: int
    values: bool
    width: int
    layers: int


@dataclass(frozen=True)
class Rule:
    """What the table says about a matrix.

    Attributes:
        std: it starts as N(0, std^2).
        rate: its learning rate over the optimiser's.
        decay: its weight decay over the optimiser's.
    """

    std: float
    rate: float = 1.0
    decay: float = 1.0


@dataclass(frozen=True)
class Part:
    """A matrix inside a parameter: most parameters are one, joint ones hold values beside others."""

    matrix: Matrix
    rule: Rule
    view: Tensor


InitTable = dict[str, tuple[Part, ...]]
"""By parameter name; gains and biases have no parts."""


class Init(Spec):
    """Base of the schemes; ``std`` is the spread of matrices at the width where it was chosen."""

    std: float = Field(default=0.02, gt=0)

    def rule(self, matrix: Matrix) -> Rule:
        """The line of the table for a matrix."""
        raise NotImplementedError

    def head_scale(self, width: int) -> float:
        """What the last rows are multiplied by before the head."""
        return 1.0


class NormalInit(Init):
    """Every matrix N(0, std^2) (MAI-Base-1, Mixtral, Gemma)."""

    kind: Literal["normal"] = "normal"

    def rule(self, matrix: Matrix) -> Rule:
        return Rule(self.std)


class DepthScaledInit(Init):
    """N(0, std^2), and std / sqrt(2 L) for the matrices that write to the residual stream (GPT-2)."""

    kind: Literal["depth_scaled"] = "depth_scaled"

    def rule(self, matrix: Matrix) -> Rule:
        return Rule(self.std / math.sqrt(2 * matrix.layers) if matrix.role in OUTWARD else self.std)


class DeepNormInit(Init):
    """Xavier's ``sqrt(2 / (inputs + outputs))``, times ``(8 L) ** -0.25`` where a branch's size depends on it: feed-
    forward, values and attention's output. Embedding, head and router N(0, std^2) (2203.00555; minimax-01 5.1).
    """

    kind: Literal["deepnorm"] = "deepnorm"

    def rule(self, matrix: Matrix) -> Rule:
        if matrix.role in (Role.EMBEDDING, Role.HEAD, Role.ROUTER):
            return Rule(self.std)
        shrinks = matrix.values or matrix.role is not Role.ATTENTION_IN
        gain = (8 * matrix.layers) ** -0.25 if shrinks else 1.0
        return Rule(gain * math.sqrt(2 / (matrix.inputs + matrix.outputs)))


class MuPInit(Init):
    """muP for Adam: what is best at width ``base_width`` is best at any (2203.03466, table 8; mai-base-1, section 11).

    With ``r = D / base_width``, for a family whose heads (or their width), hidden units and ranks grow with D:

    * embedding, gains, biases: as they are.
    * hidden matrices: variance over r, rate over r, so that their update moves the stream as much at any width.
    * head: std as it is, and its input over r (:meth:`head_scale`), which serves a tied table too.
    * router, whose outputs do not grow: std and rate over r. To Adam that is the same as the head's way, and it needs
      no factor in any router.
    * decay times r where the rate is over r: their product stays.

    Where heads grow wider rather than more, scores need ``1/K``, which is the KV option's to say:
    :meth:`score_scale` gives the number, and a rule refuses another.

    Attributes:
        base_width: D of the model whose settings are carried over.
        base_head_dim: K of that model, where heads grow wider with D; None where K stays.
        head_std: of an untied head; None is ``std``. 0 takes away what a random head adds at small widths only.
    """

    kind: Literal["mup"] = "mup"
    base_width: int = Field(ge=1)
    base_head_dim: int | None = Field(default=None, ge=1)
    head_std: float | None = Field(default=None, ge=0)

    def rule(self, matrix: Matrix) -> Rule:
        if matrix.role is Role.HEAD and self.head_std is not None:
            return Rule(self.head_std)
        if matrix.role in (Role.EMBEDDING, Role.HEAD):
            return Rule(self.std)
        r = matrix.width / self.base_width
        std = self.std / (r if matrix.role is Role.ROUTER else math.sqrt(r))
        return Rule(std, rate=1 / r, decay=r)

    def head_scale(self, width: int) -> float:
        return self.base_width / width

    def score_scale(self, head_dim: int) -> float:
        """``sqrt(K0) / K``, which is ``1 / sqrt(K)`` at the base."""
        return math.sqrt(self.base_head_dim or head_dim) / head_dim


AnyInit = Annotated[NormalInit | DepthScaledInit | DeepNormInit | MuPInit, Field(discriminator="kind")]


def table(model: nn.Module, init: Init, width: int, layers: int) -> InitTable:
    """The table of a built model, in the order of its parameters' names."""
    by_role, modules = roles(model), dict(model.named_modules())
    found = {}
    for name, parameter in model.named_parameters():
        owner, _, attribute = name.rpartition(".")
        found[name] = () if by_role[name] in SET else tuple(
            Part(matrix, _rule(init, matrix, modules[owner]), view)
            for matrix, view in _matrices(modules[owner], attribute, parameter, by_role[name], width, layers)
        )
    return found


def _rule(init: Init, matrix: Matrix, module: nn.Module) -> Rule:
    """The scheme's rule; matrices of a module with ``starts_at_zero`` start at 0 under every scheme."""
    rule = init.rule(matrix)
    return replace(rule, std=0.0) if getattr(module, "starts_at_zero", False) else rule


def _matrices(
    module: nn.Module, attribute: str, parameter: Tensor, role: Role, width: int, layers: int
) -> list[tuple[Matrix, Tensor]]:
    """Of a linear layer ``[out, in]``; of anything else ``[..., in, out]``."""
    inputs, outputs = parameter.shape[-2:] if parameter.ndim != 2 else reversed(parameter.shape)
    outputs //= getattr(module, "joint", {}).get(attribute, 1)
    views = [(False, parameter.detach())]
    if attribute == "weight" and isinstance(rows := getattr(module, "values", None), Values):
        views = rows.split(parameter.detach())
    return [(Matrix(role, inputs, outputs, values, width, layers), view) for values, view in views]


@torch.no_grad()
def initialise(model: nn.Module, entries: InitTable, generator: torch.Generator) -> None:
    """Fill every parameter of a built model, in the order of its names."""
    for name, parameter in model.named_parameters():
        if entries[name]:
            parameter.normal_(generator=generator)
        for part in entries[name]:
            part.view.mul_(part.rule.std)
    settle(model)


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Set what is not drawn: biases to 0, and what modules and branches say of their own."""
    by_role = roles(model)
    for name, parameter in model.named_parameters():
        if by_role[name] is Role.BIAS:
            parameter.zero_()
    for module in model.modules():
        if hasattr(module, "fill"):
            module.fill(1.0)  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, Branch):
            module.start()
