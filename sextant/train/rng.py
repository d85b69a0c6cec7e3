"""Random states of every library that has one, as tensors, so that a checkpoint needs no pickle."""

from __future__ import annotations

import json
import random
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor


def mixed(*numbers: int) -> int:
    """A seed of 63 bits that stands for all of the numbers in their order, whatever their size."""
    return int.from_bytes(blake2b(repr(numbers).encode(), digest_size=8).digest()) >> 1


def random_states() -> dict[str, Tensor]:
    """Python's, NumPy's, torch's CPU and every GPU's state."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "python": _bytes({"version": version, "internal": internal, "gauss": gauss}),
        "numpy": _bytes({"position": position, "has_gauss": has_gauss, "cached": cached}),
        "numpy.keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch.cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states |= {f"torch.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_random_states(states: dict[str, Tensor]) -> None:
    """Put saved states back; GPUs that this machine lacks are left out."""
    python = _plain(states["python"])
    random.setstate((python["version"], tuple(python["internal"]), python["gauss"]))
    numpy = _plain(states["numpy"])
    keys = states["numpy.keys"].cpu().numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(states["torch.cpu"].cpu())
    for i in range(torch.cuda.device_count()):
        if f"torch.cuda.{i}" in states:
            torch.cuda.set_rng_state(states[f"torch.cuda.{i}"].cpu(), i)


def _bytes(data: dict[str, object]) -> Tensor:
    return torch.tensor(list(json.dumps(data).encode()), dtype=torch.uint8)


def _plain(text: Tensor) -> dict:
    return json.loads(bytes(text.cpu().tolist()))
