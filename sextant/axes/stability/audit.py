"""A built model measured against the table of its start: does every parameter begin as declared?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from sextant.axes.stability.init import InitTable, Part, settle
from sextant.axes.stability.linear import Role, roles
from sextant.core.errors import NumericsError

ERRORS = 5.0
"""Standard errors that a drawn matrix may be off; one of two million is, by chance."""


class Started(Protocol):
    """A model that knows its table, as a Transformer does."""

    @property
    def init_table(self) -> InitTable: ...


@dataclass(frozen=True)
class Finding:
    """One matrix, or what is set of one parameter.

    Attributes:
        declared, measured: standard deviations of what is drawn, mean values of what is set.
        count: numbers measured.
        ok: within sampling error, or exactly as set.
    """

    parameter: str
    role: Role
    declared: float
    measured: float
    count: int
    ok: bool


def audit(model: nn.Module) -> list[Finding]:
    """Every parameter of a model that has not been trained; ``model`` must be :class:`Started`."""
    wanted, by_role = _settled(model), roles(model)
    wanted_parts, parts = _table(wanted), _table(model)
    set_values = dict(wanted.named_parameters())
    found = []
    for name, parameter in model.named_parameters():
        found += _of_set(name, by_role[name], parameter.detach(), set_values[name].detach())
        for part, want in zip(parts[name], wanted_parts[name], strict=True):
            found += _of_drawn(name, part, want.view.isnan())
    return found


def require_start(model: nn.Module) -> None:
    """Check that a model starts as its declaration says.

    Raises:
        NumericsError: a parameter that does not, the first one.
    """
    for finding in audit(model):
        if not finding.ok:
            raise NumericsError(
                "a parameter does not start as declared", where=finding.parameter,
                got=f"{finding.measured:.4g}", expected=f"{finding.declared:.4g} ({finding.role})",
            )


def _table(model: nn.Module) -> InitTable:
    started: Started = model  # type: ignore[assignment]
    return started.init_table


@torch.no_grad()
def _settled(model: nn.Module) -> nn.Module:
    """A copy with NaN wherever values are drawn."""
    copy = deepcopy(model)
    for parameter in copy.parameters():
        parameter.fill_(math.nan)
    settle(copy)
    return copy


def _of_set(name: str, role: Role, value: Tensor, wanted: Tensor) -> Iterator[Finding]:
    is_set = ~wanted.isnan()
    if is_set.any():
        got, want = value[is_set], wanted[is_set]
        means = want.double().mean().item(), got.double().mean().item()
        yield Finding(name, role, *means, got.numel(), torch.equal(got, want))


def _of_drawn(name: str, part: Part, drawn: Tensor) -> Iterator[Finding]:
    values, std = part.view[drawn].double(), part.rule.std
    if values.numel() > 1:
        measured, mean = values.std().item(), values.mean().item()
        error = ERRORS * std / math.sqrt(values.numel())
        ok = abs(measured - std) <= error / math.sqrt(2) and abs(mean) <= error
        yield Finding(name, part.matrix.role, std, measured, values.numel(), ok)
