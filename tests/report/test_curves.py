"""Intervals and speed-ups against scipy and against curves worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from vrpo.report.curves import Curve, Reach, combine, interval, mean_curve, reach, speed_up


def _curve(*scores: float, images: tuple[float, ...] | None = None, pace: float = 1.0) -> Curve:
    positions = images or tuple(1000.0 * (index + 1) for index in range(len(scores)))
    return Curve(positions, tuple(pace * position for position in positions), scores)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_interval_is_scipys(n: int) -> None:
    values = np.random.default_rng(n).normal(5, 2, n)
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    found = interval(list(values))
    assert found.n == n
    assert found.half_width is not None
    np.testing.assert_allclose([found.mean - found.half_width, found.mean + found.half_width], [low, high], rtol=1e-12)


def test_one_value_has_no_interval() -> None:
    assert interval([4.0]).half_width is None


def test_speed_up_is_interpolated_on_both_axes() -> None:
    # The baseline reaches 50 at 4,000 images. The other falls from 60 (at 1,000) to 40 (at 2,000): 50 at 1,500.
    baseline, other = _curve(100, 80, 60, 50), _curve(60, 40, 30, 25, pace=1.2)
    found = speed_up(baseline, other, "images")
    assert found is not None
    assert (found.ratio, found.bound, found.reached) == (4000 / 1500, "", True)
    assert (found.baseline_needs, found.other_needs) == (4000, 1500)
    in_seconds = speed_up(baseline, other, "seconds")
    assert in_seconds is not None
    assert in_seconds.ratio == pytest.approx(4000 / (1.2 * 1500), rel=1e-12)


def test_uneven_measurements_are_interpolated() -> None:
    baseline = _curve(10, 4, images=(100, 1000))
    other = _curve(9, 7, 1, images=(50, 200, 800))
    # 4 lies half way between 7 at 200 and 1 at 800.
    found = speed_up(baseline, other, "images")
    assert found is not None
    assert found.ratio == pytest.approx(1000 / 500, rel=1e-12)


def test_not_reached() -> None:
    found = speed_up(_curve(100, 50), _curve(100, 50.001), "images")
    assert found is not None
    assert (found.ratio, found.reached, found.other_needs) == (None, False, None)


def test_equal_curves_and_touching_the_target_at_a_measurement() -> None:
    curve = _curve(100, 70, 50)
    same = speed_up(curve, curve, "images")
    assert same is not None
    assert (same.ratio, same.bound) == (1.0, "")
    exact = speed_up(curve, _curve(80, 50, 40), "images")
    assert exact is not None
    assert exact.ratio == 3000 / 2000


def test_the_baselines_own_need_is_its_first_crossing() -> None:
    # Final 60 was already passed half way between 80 at 1,000 and 40 at 2,000.
    found = speed_up(_curve(80, 40, 60), _curve(100, 60, 30), "images")
    assert found is not None
    assert (found.baseline_needs, found.ratio) == (1500, 1500 / 2000)


def test_a_curve_that_begins_below_the_target_gives_a_bound() -> None:
    found = speed_up(_curve(100, 80, 60), _curve(55, 50), "images")
    assert found is not None
    assert (found.ratio, found.bound) == (3.0, "at least")
    neither = speed_up(_curve(60, images=(3000,)), _curve(55, images=(3000,)), "images")
    assert neither is not None
    assert (neither.ratio, neither.reached) == (None, True)


def test_missing_values_are_left_out() -> None:
    nan = math.nan
    curve = Curve((1000, 2000, 3000), (nan, nan, nan), (100, nan, 50))
    assert curve.along("images") == ((1000, 100), (3000, 50))
    assert speed_up(curve, curve, "seconds") is None
    found = speed_up(_curve(100, 75), curve, "images")
    assert found is not None
    assert found.other_needs == 2000


def test_reach_on_a_plateau_and_at_the_first_point() -> None:
    assert reach([(1, 5.0), (2, 3.0), (3, 3.0)], 3.0) == Reach(2, at_most=False)
    assert reach([(1, 5.0), (2, 3.0)], 6.0) == Reach(1, at_most=True)
    assert reach([(1, 5.0)], 4.0) is None


def test_speed_ups_combine_on_the_logarithm() -> None:
    ratios = [1.5, 2.0, 1.8]
    baseline = _curve(100, 50)
    found = [speed_up(baseline, _curve(100, 50, 40, images=(1, 2000 / ratio, 5000)), "images") for ratio in ratios]
    combined = combine([item for item in found if item], "images")
    logs = np.log(ratios)
    low, high = stats.t.interval(0.95, 2, loc=logs.mean(), scale=stats.sem(logs))
    assert combined.ratio == pytest.approx(stats.gmean(ratios), rel=1e-12)
    assert (combined.low, combined.high) == pytest.approx((np.exp(low), np.exp(high)), rel=1e-9)
    assert (combined.reached, combined.n) == (3, 3)


def test_one_seed_that_does_not_reach_leaves_no_mean() -> None:
    baseline = _curve(100, 50)
    seeds = [speed_up(baseline, _curve(100, last), "images") for last in (40, 60)]
    combined = combine([item for item in seeds if item], "images")
    assert (combined.ratio, combined.low, combined.reached, combined.n) == (None, None, 1, 2)


def test_mean_curve_is_where_all_were_measured() -> None:
    found = mean_curve([_curve(4, 2, images=(10, 20)), _curve(8, 6, 1, images=(10, 15, 20))])
    assert (found.images, found.scores) == ((10, 20), (6, 1.5))
