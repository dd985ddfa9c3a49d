"""Which figures a report shows, drawn from the runs of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from vrpo.report.curves import Axis, mean_curve
from vrpo.report.figures import Line, Style, draw_history, draw_lines, time_unit, with_unique_ids
from vrpo.report.groups import Group
from vrpo.report.measures import Measure
from vrpo.report.policy import policy_sentences
from vrpo.report.telemetry import (
    Telemetry,
    Trace,
    binned_history,
    classify,
    last_profile,
    mean_trace,
    objective_logs,
    trace,
)

if TYPE_CHECKING:
    from vrpo.report.compare import Comparison


@dataclass(frozen=True)
class Chart:
    """A figure with its title; ``svg`` is trusted markup made by figures.py."""

    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class TelemetrySection:
    """The objective's own telemetry of one group, or of all where ``label`` is empty."""

    label: str
    style: Style | None
    charts: tuple[Chart, ...]
    sentences: tuple[str, ...] = ()


def curve_charts(comparison: Comparison, styles: dict[str, Style]) -> list[Chart]:
    """Return the curves of every score against images and seconds, of the alignment, and the loss by time."""
    charts: list[Chart | None] = []
    for measure in _measures(comparison.groups):
        for axis in ("images", "seconds"):
            charts.append(_measure_chart(comparison, styles, measure, axis))
    held_out = any(m.metric == "alignment" for group in comparison.groups for c in group.curves for m in c)
    if not held_out:
        charts.append(_trace_chart(comparison.groups, styles, "alignment", "Alignment", "cosine"))
    charts.append(_profile_chart(comparison.groups, styles))
    return _numbered([chart for chart in charts if chart], "c")


def _measures(groups: Sequence[Group]) -> list[Measure]:
    """Return every measure, those of samples first."""
    found = list(dict.fromkeys(m for group in groups for curves in group.curves for m in curves))
    return sorted(found, key=lambda measure: measure.protocol.held_out)


def _measure_chart(comparison: Comparison, styles: dict[str, Style], measure: Measure, axis: Axis) -> Chart | None:
    secondary = not measure.lower_is_better or measure.metric.startswith("kid")
    if axis == "seconds" and secondary:
        return None
    longest = [
        x for group in comparison.groups for curve in group.curves_of(measure).values() for x, _ in curve.along(axis)
    ]
    if not longest:
        return None
    unit, label = (1.0, "images") if axis == "images" else time_unit(max(longest))
    lines = []
    for group in comparison.groups:
        curves = list(group.curves_of(measure).values())
        style = styles[group.label]
        points = [curve.along(axis) for curve in curves]
        if len(curves) > 1:
            lines += [_line(pairs, unit, style, faint=True) for pairs in points]
            points = [mean_curve(curves).along(axis)]
        lines += [_line(pairs, unit, style) for pairs in points]
    if max((len(line.x) for line in lines), default=0) < 2:
        return None
    shared = len({m for m in _measures(comparison.groups) if m.label == measure.label}) > 1
    title = f"{measure.label} against {'images' if axis == 'images' else 'time'}"
    note = measure.protocol.text if shared else ""
    return Chart(title, draw_lines(lines, label, measure.label, markers=len(lines[-1].x) <= 24), note)


def _line(pairs: Sequence[tuple[float, float]], unit: float, style: Style, faint: bool = False) -> Line:
    return Line([x / unit for x, _ in pairs], [y for _, y in pairs], style, faint)


def _trace_chart(groups: Sequence[Group], styles: dict[str, Style], key: str, title: str, y_label: str) -> Chart | None:
    lines = []
    for group in groups:
        traces = [item for run in group.runs if len((item := trace(run, "train", key)).positions) > 1]
        lines += _trace_lines(traces, styles[group.label])
    if not any(value for line in lines for value in line.y):
        return None  # a count of mishaps that never happened
    share = any(word in y_label for word in ("share", "fraction"))
    return Chart(title, draw_lines(lines, "images", y_label, zero=share))


def _trace_lines(traces: Sequence[Trace], style: Style, label: str = "") -> list[Line]:
    if not traces:
        return []
    mean = mean_trace(traces)
    if mean is None or len(traces) == 1:
        return [Line(list(item.positions), list(item.values), style, label=label) for item in traces]
    faint = [Line(list(item.positions), list(item.values), style, faint=True) for item in traces]
    return [*faint, Line(list(mean.positions), list(mean.values), style, label=label)]


def _profile_chart(groups: Sequence[Group], styles: dict[str, Style]) -> Chart | None:
    lines = []
    for group in groups:
        profile = last_profile(group.runs, "denoising_by_time")
        if profile is not None and len(profile) > 1:
            centres = (np.arange(len(profile)) + 0.5) / len(profile)
            lines.append(Line(list(centres), list(profile), styles[group.label]))
    if not lines:
        return None
    svg = draw_lines(lines, "time t (0 = data, 1 = noise)", "denoising loss", markers=True, zoom=False)
    return Chart("Denoising loss by time", svg, "Training batches, last fifth of training.")


def telemetry_sections(comparison: Comparison, styles: dict[str, Style]) -> list[TelemetrySection]:
    """Return what the objectives logged: scalars with all groups in one figure, then a section a group."""
    together = [
        _trace_chart(comparison.groups, styles, "objective_share", "Share of time in the objective", "share of step")
    ]
    logs = {group.label: objective_logs(group.runs) for group in comparison.groups}
    scalars = dict.fromkeys(
        name
        for names in logs.values()
        for name, binned in names.items()
        if not binned and classify(name).role in ("other", "agreement", "gate")
    )
    for name in scalars:
        label = classify(name).label
        together.append(_trace_chart(comparison.groups, styles, name, label.capitalize(), label))
    sections = [TelemetrySection("", None, tuple(chart for chart in together if chart))]
    for group in comparison.groups:
        charts = _group_charts(group, logs[group.label])
        told = policy_sentences(group.runs)
        sections.append(TelemetrySection(group.label, styles[group.label], tuple(charts), told))
    prefix = count()
    return [
        replace(section, charts=tuple(_numbered(section.charts, f"t{next(prefix)}-")))
        for section in sections
        if section.charts
    ]


def _group_charts(group: Group, names: dict[str, bool]) -> list[Chart]:
    found = [classify(name) for name in names]
    charts: list[Chart | None] = [
        _reward_lines(group, [item for item in found if item.role == "reward mean"], "Rewards: mean"),
        _reward_lines(group, [item for item in found if item.role == "reward spread"], "Rewards: spread in the group"),
    ]

    def history(item: Telemetry, title: str, note: str, diverging: bool, share: bool = False) -> None:
        values = binned_history(group.runs, item.name)
        if values is not None:
            svg = draw_history(values.values, values.images, diverging=diverging, share=share)
            charts.append(Chart(title, svg, note))

    drawers: dict[str, Callable[[Telemetry], None]] = {
        "agreement": lambda item: history(item, "Agreement", "cos(Ty, Tq) by time bin", True),
        "gate": lambda item: history(item, "Gate", "omega by time bin", False, True),
        "advantage": lambda item: history(item, item.label.capitalize(), "L_own - L_encoder by time bin", True),
        "supply": lambda item: history(item, "Supplier of keys and values", "1: encoder, 0: own", False, True),
        "reward mean": lambda item: history(item, f"Reward {item.label}: mean", "", True),
        "reward spread": lambda item: history(item, f"Reward {item.label}: spread", "", False),
        "other": lambda item: history(item, item.label.capitalize(), "", False),
    }
    binned = [item for item in found if names[item.name]]
    for role, draw in drawers.items():
        for item in binned:
            if item.role == role:
                draw(item)
    return [chart for chart in charts if chart]


def _reward_lines(group: Group, rewards: Sequence[Telemetry], title: str) -> Chart | None:
    lines: list[Line] = []
    for index, reward in enumerate(rewards):
        traces = [trace(run, "train", reward.name) for run in group.runs]
        mean = mean_trace(traces)
        if mean is not None:
            style = Style((3, 4, 5, 6, 7, 8, 1, 2)[index % 8])
            lines.append(Line(list(mean.positions), list(mean.values), style, label=reward.label))
    return Chart(title, draw_lines(lines, "images", "averaged over time")) if lines else None


def _numbered(charts: Sequence[Chart], prefix: str) -> list[Chart]:
    return [
        Chart(chart.title, with_unique_ids(chart.svg, f"{prefix}{index}-"), chart.note)
        for index, chart in enumerate(charts)
    ]
