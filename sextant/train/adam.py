"""AdamW with both moments in bf16 (DeepSeek-V3, section 3.3.2; spec deepseek-v3 5.1), which torch's does not have.

A moment is read, moved and used in fp32 and rounded only to be kept. It is rounded at random, up or down by how near
each side is: to the nearest, a moment that moves by less than 1 part in 512 a step would never move at all, as the
second does from ``beta2`` 0.998 on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LowMomentAdamW(torch.optim.Optimizer):
    """torch's AdamW over fp32 parameters, with ``exp_avg`` and ``exp_avg_sq`` held in bf16.

    Works tensor by tensor, so that only one tensor's moments exist in fp32 at a time.
    """

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; closures are not called."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, self._state(parameter), group)

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device if parameter.is_cuda else "cpu")
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        return state

    def _update(self, parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        step = state["step"].add_(1)
        mean = state["exp_avg"].to(grad.dtype).lerp_(grad, 1 - beta1)
        square = state["exp_avg_sq"].to(grad.dtype).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        state["exp_avg"].copy_(rounded_at_random(mean))
        state["exp_avg_sq"].copy_(rounded_at_random(square))
        denominator = square.div_(1 - beta2**step).sqrt_().add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(mean.div_(denominator).mul_(group["lr"] / (1 - beta1**step)))


def rounded_at_random(x: Tensor) -> Tensor:
    """bf16, up or down with the odds that make its mean over draws the fp32 number; infinity and NaN stay.

    Draws come from torch's generator of the device, so a seeded step repeats.
    """
    bits = x.float().view(torch.int32)
    noise = torch.randint(1 << 16, x.shape, dtype=torch.int32, device=x.device)
    rounded = ((bits + noise) & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x.float()).to(torch.bfloat16)
