"""The lowest point of a curve over rates."""

import math

import pytest

from sextant.core.errors import UsageError
from sextant.lab.optimum import best


@pytest.mark.parametrize("at", [-6.9, -6.5, -6.13])
def test_vertex_between_the_points_of_a_grid(at):
    assert best({x / 2: 3 + 0.1 * (x / 2 - at) ** 2 for x in range(-18, -8)}) == pytest.approx(at, abs=1e-9)


def test_diverged_rates_do_not_count():
    losses = {-8.0: 2.2, -7.0: 2.0, -6.0: 2.2, -5.0: math.nan, -4.0: math.inf}
    assert best(losses) == pytest.approx(-7.0)


def test_uneven_sides_pull_the_vertex():
    assert -7.0 < best({-8.0: 2.4, -7.0: 2.0, -6.0: 2.1}) < -6.5


@pytest.mark.parametrize("losses", [{-8.0: 1.0, -7.0: 2.0, -6.0: 3.0}, {-8.0: 3.0, -7.0: 2.0, -6.0: 1.0}, {-8.0: 1.0}])
def test_an_edge_is_refused(losses):
    with pytest.raises(UsageError, match=r"edge of the grid \(got 2\^-"):
        best(losses)
