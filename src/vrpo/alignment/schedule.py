"""Weights that may change as training proceeds."""

from __future__ import annotations

from collections.abc import Mapping

from vrpo.config import parse_count
from vrpo.errors import ConfigError


class Schedule:
    """A weight as a function of the images trained on: a number, or points joined by straight lines."""

    def __init__(self, value: float | Mapping[str, float], field_name: str) -> None:
        """Read a number or a mapping such as ``{"0": 1.0, "500k": 0.2}``.

        Raises ConfigError where a key of the mapping is not a count.
        """
        points = {"0": value} if isinstance(value, int | float) else value
        self.points: list[tuple[int, float]] = []
        for key, weight in points.items():
            try:
                images = parse_count(key)
            except ValueError:
                images = None
            if not isinstance(images, int) or images < 0:
                raise ConfigError(f"{field_name} has a point at '{key}': write a count of images such as 500k.")
            self.points.append((images, float(weight)))
        if not self.points:
            raise ConfigError(f"{field_name} is an empty schedule: give a number, or points such as {{500k: 1.0}}.")
        self.points.sort()

    def __call__(self, images: int) -> float:
        """Return the weight after ``images`` images; before the first and after the last point it is
        constant.
        """
        start, before = self.points[0]
        if images <= start:
            return before
        for stop, after in self.points[1:]:
            if images <= stop:
                return before + (after - before) * (images - start) / (stop - start)
            start, before = stop, after
        return before

    @property
    def is_zero(self) -> bool:
        """Whether the weight is zero throughout."""
        return all(weight == 0 for _, weight in self.points)
