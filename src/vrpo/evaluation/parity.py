"""Known files against the values published for them: whether an installation reproduces the field's numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vrpo.errors import ConfigError, nearest
from vrpo.evaluation.evaluate import METRICS, EvaluationResult

if TYPE_CHECKING:
    from rich.console import RenderableType

_ALIASES = {"fid": "fd"}


@dataclass(frozen=True)
class Comparison:
    """A result beside published values; ``differences`` are relative, by metric."""

    result: EvaluationResult
    published: Mapping[str, float]
    differences: Mapping[str, float]
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether every published value is met within the tolerance."""
        return all(abs(difference) <= self.tolerance for difference in self.differences.values())

    def record(self) -> dict[str, Any]:
        """Return the published values, the relative differences and the tolerance, ready for JSON."""
        return {
            "values": dict(self.published),
            "relative_differences": dict(self.differences),
            "tolerance": self.tolerance,
            "agrees": self.agrees,
        }

    def table(self) -> RenderableType:
        """Return a rich table of computed and published values with the protocol below it."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("metric", "computed", "published", "difference", "")
        for column in table.columns[1:4]:
            column.justify = "right"
        for metric, label in self.result.labels().items():
            row = [label, self.result.shown(metric)]
            if metric in self.published:
                difference = self.differences[metric]
                verdict = "same" if abs(difference) <= self.tolerance else "differs"
                row += [f"{self.published[metric]:g}", f"{difference:+.2%}", verdict]
            table.add_row(*row)
        return Group(table, Text(f"Protocol: {self.result.protocol_line}"))


def parse_expected(words: Sequence[str]) -> dict[str, float]:
    """Read published values such as ``fd=2.27`` (``fid`` is the same).

    Raises:
        ConfigError: an unknown metric, or no finite number.
    """
    expected = {}
    for word in words:
        name, _, text = word.partition("=")
        metric = _ALIASES.get(name.lower(), name.lower())
        if metric not in METRICS:
            raise ConfigError(f"--expect {word} names no metric: {nearest(metric, METRICS)}")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ConfigError(f"--expect {word} gives no number: write it as {name}=2.27.")
        expected[metric] = value
    return expected


def compare_published(result: EvaluationResult, published: Mapping[str, float], tolerance: float) -> Comparison:
    """Compare a result with published values by relative difference, absolute where the published one is 0."""
    differences = {
        metric: (result.metrics[metric] - value) / (abs(value) or 1.0) for metric, value in published.items()
    }
    return Comparison(result, published, differences, tolerance)
