"""The curve goes through what was measured and follows the solves in between."""

import math
from itertools import pairwise

import pytest

from obsdiff.allocation.curves import error_curve, interpolate

SOLVED = {0.1: 1e-5, 0.3: 4e-4, 0.5: 3e-3, 0.7: 1.5e-2, 0.9: 0.12}


def test_it_goes_through_the_measurements_and_keeps_the_amplification_between():
    measured = {share: 0.02 * SOLVED[share] for share in (0.3, 0.9)}
    shares = [0.0, *SOLVED]
    curve = error_curve(SOLVED, measured, shares)
    assert curve[0] == 0
    assert curve[1:] == pytest.approx([0.02 * error for error in SOLVED.values()], rel=1e-9)


def test_it_never_falls_and_is_zero_for_a_layer_without_effect():
    curve = error_curve({0.2: 0.1, 0.5: 0.05, 0.8: 0.2}, {0.2: 0.1, 0.8: 0.2}, [i / 20 for i in range(20)])
    assert all(a <= b for a, b in pairwise(curve))
    assert error_curve(SOLVED, {0.5: 0.0, 0.9: 0.0}, [0.0, 0.5, 0.98]) == [0, 0, 0]


def test_interpolation():
    points = [(0.0, 1.0), (1.0, 3.0), (3.0, 3.0)]
    assert [interpolate(points, at) for at in (-1, 0.5, 2, 9)] == [1, 2, 3, 3]
    assert interpolate(points, -1, extend=True) == -1 and interpolate([(2.0, 5.0)], 7) == 5
    assert math.isfinite(error_curve(SOLVED, {0.5: 1e-4}, [0.98])[0])
