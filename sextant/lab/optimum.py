"""Where a curve over a learning rate is lowest, to better than its grid."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from sextant.core.errors import UsageError

REACH = 1.01
"""Octaves on both sides of the lowest point that the parabola is fitted to."""


def best(losses: Mapping[float, float]) -> float:
    """The exponent where losses over ``log2 rate`` are lowest: vertex of a parabola near the lowest point.

    Raises:
        UsageError: the lowest finite point is the first or last, so that the best may lie outside.
    """
    finite = {x: loss for x, loss in sorted(losses.items()) if math.isfinite(loss)}
    lowest = min(finite, key=finite.__getitem__)
    near = {x: loss for x, loss in finite.items() if abs(x - lowest) <= REACH}
    if lowest in (min(finite), max(finite)) or len(near) < 3:
        raise UsageError("the best rate is at the edge of the grid", got=f"2^{lowest:g}", fix="Widen the grid")
    square, slope, _ = np.polyfit([x - lowest for x in near], list(near.values()), 2)
    if square <= 0:
        return lowest
    return float(lowest + np.clip(-slope / (2 * square), -REACH, REACH))
