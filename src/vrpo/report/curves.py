"""Statistics on measured curves: intervals over seeds and speed-up at equal quality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Axis = Literal["images", "seconds"]
Bound = Literal["", "at least", "at most"]


@dataclass(frozen=True)
class Interval:
    """A mean over n values and the half-width of its 95% interval, which one value alone does not have."""

    mean: float
    half_width: float | None
    n: int


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of the values and the half-width of Student's two-sided 95% interval for it."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean, None, n)
    from scipy.stats import t

    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Interval(mean, float(t.ppf(0.975, n - 1)) * math.sqrt(variance / n), n)


@dataclass(frozen=True)
class Curve:
    """A score measured while training, in order; seconds are NaN where they were not recorded."""

    images: tuple[float, ...]
    seconds: tuple[float, ...]
    scores: tuple[float, ...]

    def along(self, axis: Axis) -> tuple[tuple[float, float], ...]:
        """Return the finite (position, score) pairs along an axis."""
        pairs = zip(self.images if axis == "images" else self.seconds, self.scores, strict=True)
        return tuple((x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y))

    def at(self, images: float) -> float | None:
        """Return the score measured at exactly this number of images, None where there was no measurement."""
        for x, y in zip(self.images, self.scores, strict=True):
            if x == images:
                return y
        return None


@dataclass(frozen=True)
class Reach:
    """Where a curve first reaches a score; ``at_most`` where its very first measurement is already there."""

    position: float
    at_most: bool


def reach(points: Sequence[tuple[float, float]], target: float) -> Reach | None:
    """Return where the piecewise linear curve first falls to the target, None where it never does."""
    for index, (x, y) in enumerate(points):
        if y > target:
            continue
        if index == 0:
            return Reach(x, at_most=True)
        before_x, before_y = points[index - 1]
        return Reach(before_x + (before_y - target) / (before_y - y) * (x - before_x), at_most=False)
    return None


@dataclass(frozen=True)
class SpeedUp:
    """What the baseline needs to reach its final score over what the other needs to reach the same score.

    ``ratio`` is None where ``reached`` is false, or where the curves begin too late to tell; the needs are in
    the axis' unit.
    """

    ratio: float | None
    bound: Bound
    reached: bool
    baseline_needs: float
    other_needs: float | None


def speed_up(baseline: Curve, other: Curve, axis: Axis) -> SpeedUp | None:
    """Compare two curves of a score that is better when lower; None where one has no points on this axis."""
    reference, points = baseline.along(axis), other.along(axis)
    if not reference or not points:
        return None
    target = reference[-1][1]
    needed, found = reach(reference, target), reach(points, target)
    assert needed is not None  # the last point of the baseline has the score by definition
    if found is None:
        return SpeedUp(None, "", False, needed.position, None)
    if (needed.at_most and found.at_most) or found.position <= 0:
        return SpeedUp(None, "", True, needed.position, found.position)
    bound: Bound = "at least" if found.at_most else "at most" if needed.at_most else ""
    return SpeedUp(needed.position / found.position, bound, True, needed.position, found.position)


@dataclass(frozen=True)
class PairedSpeedUp:
    """Speed-ups over seeds: geometric mean and 95% interval, or how many seeds did not reach the score.

    A ratio is given only if every seed reached the score: a mean over the lucky ones would flatter.
    """

    axis: Axis
    ratio: float | None
    low: float | None
    high: float | None
    bound: Bound
    reached: int
    n: int
    baseline_needs: float
    other_needs: float | None
    each: tuple[float | None, ...]


def combine(speed_ups: Sequence[SpeedUp], axis: Axis) -> PairedSpeedUp:
    """Combine one speed-up a seed; the interval is Student's on the logarithms, since ratios multiply."""
    each = tuple(item.ratio for item in speed_ups)
    reached = sum(item.reached for item in speed_ups)
    ratios = [ratio for ratio in each if ratio is not None and ratio > 0]
    bounds = {item.bound for item in speed_ups} - {""}
    found = [item.other_needs for item in speed_ups if item.other_needs is not None]
    mean = low = high = None
    bound: Bound = ""
    if len(ratios) == len(speed_ups) and len(bounds) < 2:
        logs = interval([math.log(ratio) for ratio in ratios])
        mean = ratios[0] if len(ratios) == 1 else math.exp(logs.mean)
        bound = bounds.pop() if bounds else ""
        if logs.half_width is not None and not bound:
            low, high = mean * math.exp(-logs.half_width), mean * math.exp(logs.half_width)
    return PairedSpeedUp(
        axis=axis,
        ratio=mean,
        low=low,
        high=high,
        bound=bound,
        reached=reached,
        n=len(speed_ups),
        baseline_needs=math.fsum(item.baseline_needs for item in speed_ups) / len(speed_ups),
        other_needs=math.fsum(found) / len(found) if len(found) == len(speed_ups) else None,
        each=each,
    )


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean of several curves at the numbers of images where all of them were measured."""
    shared = sorted(set.intersection(*(set(curve.images) for curve in curves))) if curves else []
    rows = [[curve.images.index(x) for curve in curves] for x in shared]

    def mean(field: Literal["seconds", "scores"]) -> tuple[float, ...]:
        return tuple(
            math.fsum(getattr(curve, field)[i] for curve, i in zip(curves, row, strict=True)) / len(curves)
            for row in rows
        )

    return Curve(tuple(shared), mean("seconds"), mean("scores"))
