"""Random order that never changes: the same on every machine and with every version of numpy.

Generators of numpy may give other numbers in a later version; a run that resumes after an upgrade must not.
"""

from __future__ import annotations

import hashlib

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def mix(values_N: np.ndarray, *key: object) -> np.ndarray:
    """uint64 [N] that looks random, from integers and a key (SplitMix64, Steele et al. 2014)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    z = values_N.astype(np.uint64) * _GAMMA + np.frombuffer(digest[:8], "<u8")[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def shuffled(n: int, *key: object) -> np.ndarray:
    """A permutation of 0 to n - 1, int64 [n], that depends on the key alone."""
    return np.argsort(mix(np.arange(n), *key), kind="stable")
