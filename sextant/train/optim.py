"""Optimisers over parameter roles: AdamW, and Muon for hidden matrices with AdamW for the rest.

Gains and biases are never decayed: a decayed zero gain would stay biased towards zero. Other decays may differ by
role (MAI-Base-1 decays attention by 0.01 and embeddings by 0.005 where the rest gets 0.1). The model's start may ask
for other rates by matrix (muP); every rate and decay is multiplied by what its table says.
"""

from __future__ import annotations

from collections import defaultdict
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sextant.axes.stability import Role, roles
from sextant.axes.stability.init import Rule
from sextant.core.errors import CheckpointError, UsageError
from sextant.core.spec import Spec
from sextant.model.transformer import Transformer
from sextant.train.adam import LowMomentAdamW

AS_DECLARED = Rule(std=0.0)
"""Of parameters that are not in the table: rate and decay as the optimiser declares them."""
Beta = Annotated[float, Field(ge=0, lt=1)]
_PLAIN = (Role.GAIN, Role.BIAS)
_ORTHOGONAL = (Role.ATTENTION_IN, Role.ATTENTION_OUT, Role.FF_IN, Role.FF_OUT)


class Decay(Spec):
    """Weight decay by role; gains and biases have none."""

    default: float = Field(default=0.1, ge=0)
    attention: float | None = Field(default=None, ge=0)
    embedding: float | None = Field(default=None, ge=0)

    def of(self, role: Role) -> float:
        """Decay of a parameter with this role."""
        if role in _PLAIN:
            return 0.0
        attention = role in (Role.ATTENTION_IN, Role.ATTENTION_OUT)
        special = self.attention if attention else self.embedding if role is Role.EMBEDDING else None
        return self.default if special is None else special


class AdamW(Spec):
    """AdamW (1711.05101) with decay by role.

    Attributes:
        moments: how both moments are kept; bf16 as in DeepSeek-V3, rounded at random. Parameters stay fp32 masters.
    """

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(default=3e-3, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    decay: Decay = Decay()
    moments: Literal["fp32", "bf16"] = "fp32"

    @property
    def low_moments(self) -> bool:
        """Whether the moments of AdamW are kept in bf16."""
        return self.moments == "bf16"

    def build(self, model: Transformer) -> Optimiser:
        return Optimiser([self.adam(learning(model), model)], model)

    def adam(self, named: dict[str, nn.Parameter], model: Transformer) -> torch.optim.Optimizer:
        """AdamW over these parameters of a model, one group per decay and rate; torch's where moments are fp32."""
        groups = _grouped(named, model, self.decay, self.lr)
        if self.low_moments:
            return LowMomentAdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


class Muon(Spec):
    """Muon (torch's) for the hidden 2-D matrices, AdamW for embeddings, head, router, gains and expert stacks.

    Expert stacks are three-dimensional, which torch's Muon does not take: they stay with AdamW, and so does everything
    whose rows are looked up or compared rather than multiplied through.
    """

    kind: Literal["muon"] = "muon"
    lr: float = Field(default=0.02, gt=0)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    adamw: AdamW = AdamW()

    @property
    def low_moments(self) -> bool:
        """Whether the moments of AdamW are kept in bf16; Muon's momentum is fp32."""
        return self.adamw.low_moments

    def build(self, model: Transformer) -> Optimiser:
        by_role, named = roles(model), learning(model)
        ours = {n: p for n, p in named.items() if p.ndim == 2 and by_role[n] in _ORTHOGONAL}
        rest = {n: p for n, p in named.items() if n not in ours}
        muon = torch.optim.Muon(
            _grouped(ours, model, self.adamw.decay, self.lr),
            lr=self.lr,
            momentum=self.momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        return Optimiser([muon, self.adamw.adam(rest, model)], model)


AnyOptimiser = Annotated[AdamW | Muon, Field(discriminator="kind")]


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def train_only(model: nn.Module, names: str) -> int:
    """Freeze every parameter whose name does not match the pattern ``names``, such as ``*.pattern.gate.*``.

    Returns:
        Parameters that are left to learn.

    Raises:
        UsageError: no parameter has such a name.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(fnmatchcase(name, names))
    count = sum(parameter.numel() for parameter in learning(model).values())
    if not count:
        known = ", ".join(sorted({name.rpartition(".")[0] for name, _ in model.named_parameters()})[:4])
        raise UsageError("no parameter to train", where="train_only", got=names, expected=f"a pattern of {known}, ...")
    return count


def _grouped(named: dict[str, nn.Parameter], model: Transformer, decay: Decay, lr: float) -> list[dict[str, Any]]:
    """One group per decay and rate: the declared ones, times what the model's table says of the matrix."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    by_role, table = roles(model), model.init_table
    for name, parameter in named.items():
        rule = table[name][0].rule if table[name] else AS_DECLARED
        groups[decay.of(by_role[name]) * rule.decay, lr * rule.rate].append(parameter)
    return [{"params": params, "weight_decay": value, "lr": rate} for (value, rate), params in groups.items()]


class Optimiser:
    """One or more torch optimisers that step together, with state addressed by parameter name."""

    def __init__(self, parts: list[torch.optim.Optimizer], model: nn.Module):
        self.parts = parts
        self.model = model
        self.peaks = [[group["lr"] for group in part.param_groups] for part in parts]

    def step(self, factor: float) -> None:
        """Update at ``factor`` times the peak rates, then drop the gradients."""
        for part, peaks in zip(self.parts, self.peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            part.step()
        self.zero()

    def zero(self) -> None:
        """Drop the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    @property
    def lr(self) -> float:
        """Rate of the last step, of the first group."""
        return float(self.parts[0].param_groups[0]["lr"])

    def tensors(self) -> dict[str, Tensor]:
        """State as ``{"parameter name.exp_avg": tensor}``, whatever the grouping."""
        return {f"{name}.{key}": value for name, state in self._states() for key, value in state.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put saved state back.

        Raises:
            CheckpointError: a tensor for a parameter that does not exist, or of another shape than it.
        """
        owners = {id(p): part for part in self.parts for group in part.param_groups for p in group["params"]}
        named = dict(self.model.named_parameters())
        for key, value in tensors.items():
            name, _, slot = key.rpartition(".")
            if name not in named:
                raise CheckpointError("optimiser state of an unknown parameter", where=name)
            target = named[name]
            if slot != "step" and value.shape != target.shape:
                raise CheckpointError(
                    "optimiser state of another shape", where=key, got=list(value.shape), expected=list(target.shape)
                )
            device = "cpu" if slot == "step" and not target.is_cuda else target.device
            owners[id(target)].state[target][slot] = value.to(device)

    def _states(self) -> list[tuple[str, dict[str, Tensor]]]:
        states = {id(p): state for part in self.parts for p, state in part.state.items()}
        return [(name, states[id(p)]) for name, p in self.model.named_parameters() if id(p) in states]
