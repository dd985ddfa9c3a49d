"""Comparing runs: final scores by protocol, speed-ups at equal quality, and the outcome in one line."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vrpo.errors import DataError
from vrpo.files import write_text
from vrpo.report import formats
from vrpo.report.curves import Axis, Curve, Interval, PairedSpeedUp, combine, interval, mean_curve, speed_up
from vrpo.report.groups import Group, choose_baseline, config_differences, group_runs, is_circular
from vrpo.report.measures import Measure, Protocol
from vrpo.runs import Run


@dataclass(frozen=True)
class Final:
    """A group's score at the common budget, and its difference to the baseline, paired by seed."""

    score: Interval | None
    difference: Interval | None


@dataclass(frozen=True)
class Table:
    """Final scores, each column of one protocol; ``images`` gives the common budget of each measure."""

    protocol: Protocol | None
    held_out: Protocol | None
    measures: tuple[Measure, ...]
    images: dict[Measure, float | None]
    rows: tuple[tuple[Group, dict[Measure, Final]], ...]


@dataclass(frozen=True)
class EqualQuality:
    """A group's speed-up over the baseline for one measure, in images and in seconds (None: not measured)."""

    measure: Measure
    group: Group
    target: float
    paired: bool
    images: PairedSpeedUp
    seconds: PairedSpeedUp | None


@dataclass(frozen=True)
class Comparison:
    """What comparing runs found; ``result`` is its one line, ``report`` the HTML file."""

    title: str
    report: Path
    baseline: Group
    groups: tuple[Group, ...]
    tables: tuple[Table, ...]
    speed_ups: tuple[EqualQuality, ...]
    differences: dict[str, dict[str, Any]]
    warnings: tuple[str, ...]
    results: tuple[str, ...] = field(default=())

    @property
    def result(self) -> str:
        """The outcome in one line."""
        if self.results:
            return "; ".join(self.results)
        if len(self.groups) == 1:
            return f"one configuration, {self.baseline.label}: nothing to compare it with"
        return f"no score in common with {self.baseline.label}: nothing to compare"

    @property
    def protocols(self) -> tuple[Protocol, ...]:
        """Every protocol that some run was scored by."""
        found = {measure.protocol: None for group in self.groups for run in group.curves for measure in run}
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain JSON values; what was not measured is null."""
        return {
            "title": self.title,
            "result": self.result,
            "baseline": self.baseline.label,
            "groups": [
                {
                    "label": group.label,
                    "objective": group.objective,
                    "runs": [
                        {"path": str(run.path), "seed": run.seed, "cost": dataclasses.asdict(cost)}
                        for run, cost in zip(group.runs, group.costs, strict=True)
                    ],
                }
                for group in self.groups
            ],
            "tables": [
                {
                    "protocol": json.loads(table.protocol.key) if table.protocol else None,
                    "held_out": json.loads(table.held_out.key) if table.held_out else None,
                    "rows": {
                        group.label: {
                            measure.metric: {"images": table.images[measure], **dataclasses.asdict(final)}
                            for measure, final in finals.items()
                        }
                        for group, finals in table.rows
                    },
                }
                for table in self.tables
            ],
            "speed_ups": [
                {
                    "measure": row.measure.label,
                    "protocol": json.loads(row.measure.protocol.key),
                    "group": row.group.label,
                    "target": row.target,
                    "paired": row.paired,
                    "images": dataclasses.asdict(row.images),
                    "seconds": dataclasses.asdict(row.seconds) if row.seconds else None,
                }
                for row in self.speed_ups
            ],
            "differences": self.differences,
            "warnings": list(self.warnings),
        }


def compare(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    title: str | None = None,
    baseline: str | None = None,
    json_file: bool = False,
) -> Comparison:
    """Compare runs and write one self-contained HTML report to ``out`` (and the same as JSON beside it).

    The baseline is the group of this label or objective; by default ``none``, else ``repa``, else the first.
    Raises DataError for a folder that is no run, or a baseline that is not among them.
    """
    from vrpo.report.caveats import find_caveats
    from vrpo.report.html import render

    if not runs:
        raise DataError("no runs to compare: give one or more folders made by vrpo train.")
    opened = [Run(path) for path in {Path(run).resolve(): run for run in reversed(runs)}.values()][::-1]
    groups, repeated = group_runs(opened)
    reference = choose_baseline(groups, baseline)
    groups = (reference, *(group for group in groups if group is not reference))
    speed_ups = tuple(_speed_ups(reference, groups[1:]))
    tables = tuple(_tables(groups))
    differences = config_differences(groups)
    comparison = Comparison(
        title=title or _title(groups),
        report=Path(out),
        baseline=reference,
        groups=groups,
        tables=tables,
        speed_ups=speed_ups,
        differences=differences,
        warnings=(*repeated, *find_caveats(groups, tables, differences)),
    )
    comparison = dataclasses.replace(comparison, results=tuple(_result_lines(comparison)))
    comparison.report.parent.mkdir(parents=True, exist_ok=True)
    write_text(comparison.report, render(comparison))
    if json_file:
        text = json.dumps(_finite(comparison.to_dict()), indent=1, default=str, allow_nan=False)
        write_text(comparison.report.with_suffix(".json"), text + "\n")
    return comparison


def _title(groups: Sequence[Group]) -> str:
    objectives = ", ".join(dict.fromkeys(group.objective for group in groups))
    return f"{objectives} compared" if len(groups) > 1 else f"One configuration: {objectives}"


def common_budget(curves: Sequence[Curve]) -> float | None:
    """Return the largest number of images at which every curve was measured, None if there is none."""
    shared = set.intersection(*(set(curve.images) for curve in curves)) if curves else set()
    return max(shared, default=None)


def _tables(groups: Sequence[Group]) -> list[Table]:
    measures = list(dict.fromkeys(m for group in groups for curves in group.curves for m in curves))
    sampled: list[Protocol | None] = list(dict.fromkeys(m.protocol for m in measures if not m.protocol.held_out))
    held_out: list[Protocol | None] = list(dict.fromkeys(m.protocol for m in measures if m.protocol.held_out))
    tables: list[Table] = []
    for protocol in sampled or [None]:
        for held in held_out or [None]:
            shown = [m for kind in (protocol, held) for m in measures if m.protocol == kind]
            first = not tables
            rows = [group for group in groups if _belongs(group, protocol, held, first)]
            if rows and shown:
                tables.append(_table(protocol, held, shown, rows))
    return [table for table in tables if any(final.score for _, row in table.rows for final in row.values())]


def _belongs(group: Group, protocol: Protocol | None, held_out: Protocol | None, first: bool) -> bool:
    """Whether a group can stand in a table: scored by its protocols, or, in the first table, not at all."""
    own = {measure.protocol for curves in group.curves for measure in curves}
    sampled = {item for item in own if not item.held_out}
    return (protocol in sampled or (not sampled and first)) and (own == sampled or held_out in own)


def _table(protocol: Protocol | None, held_out: Protocol | None, measures: list[Measure], groups: list[Group]) -> Table:
    images: dict[Measure, float | None] = {}
    finals: dict[str, dict[Measure, Final]] = {group.label: {} for group in groups}
    for measure in measures:
        curves = {group.label: group.curves_of(measure) for group in groups}
        budget = common_budget([curve for by_seed in curves.values() for curve in by_seed.values()])
        images[measure] = budget
        scores = {
            label: {
                seed: value
                for seed, curve in by_seed.items()
                if (value := curve.scores[-1] if budget is None else curve.at(budget)) is not None
            }
            for label, by_seed in curves.items()
        }
        reference = scores[groups[0].label]
        for index, group in enumerate(groups):
            own = scores[group.label]
            paired = [own[seed] - reference[seed] for seed in own if seed in reference] if index else []
            finals[group.label][measure] = Final(
                interval(list(own.values())) if own else None, interval(paired) if paired else None
            )
    rows = tuple((group, finals[group.label]) for group in groups)
    return Table(protocol, held_out, tuple(measures), images, rows)


def _speed_ups(reference: Group, others: Sequence[Group]) -> list[EqualQuality]:
    rows = []
    measures = dict.fromkeys(m for curves in reference.curves for m in curves if m.lower_is_better)
    for measure in measures:
        baselines = reference.curves_of(measure)
        for group in others:
            curves = group.curves_of(measure)
            if not curves:
                continue
            pairs = [(baselines[seed], curves[seed]) for seed in baselines if seed in curves]
            paired = bool(pairs)
            if not paired:  # no seed in common: the mean curves are compared, without an interval
                pairs = [(mean_curve(list(baselines.values())), mean_curve(list(curves.values())))]
            images, seconds = (_combined(pairs, axis) for axis in ("images", "seconds"))
            if images is not None:
                target = math.fsum(base.scores[-1] for base, _ in pairs) / len(pairs)
                rows.append(EqualQuality(measure, group, target, paired, images, seconds))
    return rows


def _combined(pairs: Sequence[tuple[Curve, Curve]], axis: Axis) -> PairedSpeedUp | None:
    found = [speed_up(baseline, other, axis) for baseline, other in pairs]
    known = [item for item in found if item is not None]
    return combine(known, axis) if known and len(known) == len(found) else None


def _result_lines(comparison: Comparison) -> list[str]:
    """Return one sentence a group, on the leading score.

    That is the first distance of samples, where possible in a network that nothing was aligned to, else the
    held-out loss.
    """
    rows = comparison.speed_ups
    measures = sorted(
        dict.fromkeys(row.measure for row in rows),
        key=lambda measure: (measure.protocol.held_out, is_circular(measure.protocol, comparison.groups)),
    )
    leading = measures[0] if measures else None
    return [_result_line(comparison, row) for row in rows if row.measure == leading]


def _result_line(comparison: Comparison, row: EqualQuality) -> str:
    base, measure = comparison.baseline.label, row.measure
    table = next(
        table
        for table in comparison.tables
        if measure in table.measures and any(group is row.group for group, _ in table.rows)
    )
    finals = {group.label: final[measure].score for group, final in table.rows}
    own, reference = finals[row.group.label], finals.get(base)
    budget = table.images[measure]
    at = f" at {formats.count(budget)} images" if budget is not None else ""
    seeds = f", {row.images.n} seeds" if row.images.n > 1 else ""
    scores = f"({formats.with_interval(own)} vs {formats.with_interval(reference)}{at}{seeds})"
    goal = f"{base}'s final {measure.label}"
    if reference is None or formats.score(reference.mean) != formats.score(row.target):
        goal += f" of {formats.score(row.target)}"  # the baseline was trained beyond the common budget
    if row.images.reached == 0:
        return f"{row.group.label} does not reach {goal} {scores}"
    if row.images.reached < row.images.n:
        return f"{row.group.label} reaches {goal} in {row.images.reached} of {row.images.n} seeds {scores}"
    if row.images.ratio is None:
        return f"{row.group.label} reaches {goal}, too early to tell how much sooner {scores}"
    parts = [_sooner(row.images, "fewer images", "more images", "the same number of images")]
    if row.seconds is not None and row.seconds.ratio is not None:
        parts.append(_sooner(row.seconds, "less time", "more time", "the same time"))
    return f"{row.group.label} reaches {goal} in {' and '.join(parts)} {scores}"


def _sooner(found: PairedSpeedUp, less: str, more: str, same: str) -> str:
    assert found.ratio is not None
    bound = f"{found.bound} " if found.bound else ""
    if formats.ratio(found.ratio) == "1.00x" and not bound:
        return same
    if found.ratio < 1 and not bound:
        return f"{formats.ratio(1 / found.ratio)} {more}"
    return f"{bound}{formats.ratio(found.ratio)} {less}"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
