"""Reducing long curves, and curves with values that are not finite."""

from __future__ import annotations

import numpy as np
import pytest

from rlinf_lite.report.curves import MOST_POINTS, extremes, make_curve, smoothed


def test_no_spike_is_lost_among_100_000_points():
    steps, values = np.arange(100_000), np.zeros(100_000)
    values[77_777], values[3] = 5.0, -7.0
    thin_steps, thin = extremes(steps, values)
    assert len(thin) <= MOST_POINTS and (np.diff(thin_steps) > 0).all()
    assert thin[thin_steps == 77_777] == 5.0 and thin[thin_steps == 3] == -7.0


def test_a_short_curve_is_unchanged():
    steps, values = np.arange(MOST_POINTS), np.random.default_rng(0).random(MOST_POINTS)
    assert extremes(steps, values)[1] is values


def test_a_straight_line_stays_straight_except_at_its_ends():
    steps, values = np.arange(200), 3.0 * np.arange(200)
    places, smooth = smoothed(steps, values)
    assert len(places) == 200 and smooth[10:-10] == pytest.approx(values[10:-10])
    assert abs(smooth[0] - values[0]) <= 3 and abs(smooth[-1] - values[-1]) <= 3


def test_values_that_are_not_finite_are_counted_and_not_drawn():
    made = make_curve((np.arange(4), np.array([1.0, np.nan, np.inf, 2.0])), label="", colour=0, smooth=True)
    assert made.num_not_finite == 2 and made.points[0].tolist() == [0, 3] and made.smooth is None
    assert make_curve((np.arange(2), np.array([np.nan, np.nan])), label="", colour=0, smooth=False) is None
