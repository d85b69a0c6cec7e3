"""Contract of axis 6: which tensor is held and computed in which dtype, and why."""

from __future__ import annotations

import torch
from torch import Tensor

from sextant.core.spec import Spec


class Numerics(Spec):
    """A dtype policy. Modules ask it for the compute dtype and leave the fp32 paths alone."""

    @property
    def compute(self) -> torch.dtype | None:
        """What matrix products run in; None leaves tensors as they are (fp32, or fp64 in tests)."""
        raise NotImplementedError

    def lower(self, x: Tensor) -> Tensor:
        """Cast an activation to the compute dtype on its way into a matrix product."""
        return x if self.compute is None else x.to(self.compute)

    @property
    def itemsize(self) -> int:
        """Bytes per element of activations and decoding states."""
        return 4 if self.compute is None else self.compute.itemsize
