"""The report of a comparison as one HTML file that needs nothing but itself."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vrpo import __version__
from vrpo.report import formats
from vrpo.report.charts import curve_charts, telemetry_sections
from vrpo.report.curves import PairedSpeedUp
from vrpo.report.figures import PALETTE, Style, assign_styles
from vrpo.report.groups import Group, experiment_settings
from vrpo.runs import Run, SampleGrid, number

if TYPE_CHECKING:
    from vrpo.report.compare import Comparison, EqualQuality, Table

_WIDEST = 5  # groups that fit side by side; with more, each group is a row


@dataclass(frozen=True)
class Cell:
    """One cell of a table: its text, a smaller second line, and whether it is the best of its measure."""

    text: str
    note: str = ""
    best: bool = False


@dataclass(frozen=True)
class Head:
    """A row's or column's heading, with the style of the group that it names."""

    text: str
    note: str = ""
    style: Style | None = None


@dataclass(frozen=True)
class Grid:
    """A table ready to print."""

    columns: tuple[Head, ...]
    rows: tuple[tuple[Head, tuple[Cell, ...]], ...]
    captions: tuple[str, ...] = ()

    def transposed(self) -> Grid:
        """Return the table with rows and columns exchanged."""
        cells = zip(*(row for _, row in self.rows), strict=True)
        rows = tuple((head, tuple(column)) for head, column in zip(self.columns, cells, strict=True))
        return Grid(tuple(head for head, _ in self.rows), rows, self.captions)


@dataclass(frozen=True)
class SampleFigure:
    """A grid of samples with the group that drew it; ``source`` is a data URI."""

    group: Group
    style: Style
    source: str
    note: str


def render(comparison: Comparison) -> str:
    """Return the report's HTML: all text from data escaped, images embedded, no scripts, nothing fetched."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vrpo.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    groups = comparison.groups
    styles = dict(
        zip(
            (group.label for group in groups),
            assign_styles([group.objective for group in groups]),
            strict=True,
        )
    )
    together = len(comparison.tables) == 1 and len(groups) <= _WIDEST
    page = environment.get_template("report.html.j2").render(
        comparison=comparison,
        styles=styles,
        palette=PALETTE,
        version=__version__,
        tables=[headline(table, comparison, styles, with_cost=together) for table in comparison.tables],
        cost=None if together else cost_grid(comparison, styles),
        speed_ups=[speed_up_row(row, styles) for row in comparison.speed_ups],
        charts=curve_charts(comparison, styles),
        telemetry=telemetry_sections(comparison, styles),
        samples=sample_figures(comparison, styles),
        differences=difference_grid(comparison, styles),
        shared=shared_configuration(groups),
        environments=environments(groups),
        commands=commands(comparison),
        formats=formats,
    )
    return page.encode("utf-8", "backslashreplace").decode()  # text from JSON may hold half a character


def headline(table: Table, comparison: Comparison, styles: dict[str, Style], with_cost: bool) -> Grid:
    """Return a table of final scores, and costs: a row a measure; for many groups, a row a group."""
    shown = [group for group, _ in table.rows]
    rows = []
    for measure in table.measures:
        finals = [finals[measure] for _, finals in table.rows]
        means = [final.score.mean for final in finals if final.score]
        if not means:
            continue
        best = min(means) if measure.lower_is_better else max(means)
        cells = [
            Cell(
                formats.with_interval(final.score),
                f"{formats.with_interval(final.difference, sign=True)}" if final.difference else "",
                final.score is not None and final.score.mean == best and len(means) > 1,
            )
            for final in finals
        ]
        budget = table.images[measure]
        note = "lower is better" if measure.lower_is_better else "higher is better"
        if budget is None:
            note += ", last measured"
        rows.append((Head(measure.label, note), tuple(cells)))
    if with_cost:
        rows += _cost_rows(shown, comparison.baseline)
    captions = tuple(
        f"{name}: {protocol.text}."
        for name, protocol in (("Samples", table.protocol), ("Held-out loss", table.held_out))
        if protocol
    )
    return _oriented(Grid(_group_heads(shown, styles), tuple(rows), captions))


def cost_grid(comparison: Comparison, styles: dict[str, Style]) -> Grid:
    """Return the table of costs alone, for where it does not stand below the only table of scores."""
    rows = tuple(_cost_rows(comparison.groups, comparison.baseline))
    return _oriented(Grid(_group_heads(comparison.groups, styles), rows))


def _oriented(grid: Grid) -> Grid:
    return grid.transposed() if len(grid.columns) > _WIDEST else grid


def _group_heads(groups: Sequence[Group], styles: dict[str, Style]) -> tuple[Head, ...]:
    return tuple(
        Head(
            group.label,
            f"{len(group.runs)} seeds" if len(group.runs) > 1 else "1 seed",
            styles[group.label],
        )
        for group in groups
    )


def _cost_rows(groups: Sequence[Group], baseline: Group) -> list[tuple[Head, tuple[Cell, ...]]]:
    def row(name: str, title: str, note: str, show: Any, relative: bool = False) -> Any:
        cells = []
        reference = baseline.cost(name)
        for group in groups:
            value = group.cost(name)
            compared = ""
            if relative and group is not baseline and value is not None and reference:
                compared = f"{formats.ratio(value / reference)} {baseline.label}"
            cells.append(Cell(show(value), compared))
        return Head(title, note), tuple(cells)

    same_budget = len({group.cost("images") for group in groups}) == 1
    rows = [
        row("images", "Images", "trained on", formats.count),
        row("seconds", "Wall-clock", "training only", formats.duration, relative=same_budget),
        row("images_per_second", "Images per second", "median", formats.score, relative=True),
        row("objective_share", "Time in objective", "share of training", formats.percent),
        row("target_share", "Time in encoders", "share of training", formats.percent),
        row("data_wait", "Waiting for data", "share of training", formats.percent),
        row("memory_mb", "Memory", "peak", formats.memory, relative=True),
    ]
    return [(head, cells) for head, cells in rows if any(cell.text != formats.MISSING for cell in cells)]


def speed_up_row(row: EqualQuality, styles: dict[str, Style]) -> dict[str, Any]:
    """Return a row of the table of speed-ups at equal quality."""
    return {
        "measure": row.measure.label,
        "protocol": row.measure.protocol,
        "label": row.group.label,
        "style": styles[row.group.label],
        "target": formats.score(row.target),
        "images": _speed_up_cell(row.images, formats.count),
        "seconds": _speed_up_cell(row.seconds, formats.duration),
    }


def _speed_up_cell(found: PairedSpeedUp | None, show: Any) -> Cell:
    if found is None:
        return Cell(formats.MISSING, "not measured")
    if found.reached < found.n:
        return Cell("not reached", f"in {found.n - found.reached} of {found.n} seeds" if found.n > 1 else "")
    needs = f"{show(found.other_needs)} vs {show(found.baseline_needs)}"
    if found.ratio is None:
        return Cell("too early to tell", needs)
    text = f"{found.bound} {formats.ratio(found.ratio)}".strip()
    if found.low is not None and found.high is not None:
        needs = f"{formats.ratio(found.low)} to {formats.ratio(found.high)}\n{needs}"
    return Cell(text, needs, best=found.ratio > 1)


def sample_figures(comparison: Comparison, styles: dict[str, Style]) -> dict[str, Any]:
    """Return the sample grids side by side, where possible of one seed and after equally many images."""
    seeds = [
        {run.seed for run in group.runs if run.sample_grids}
        for group in comparison.groups
        if any(run.sample_grids for run in group.runs)
    ]
    common = sorted(set.intersection(*seeds), key=lambda seed: seed or 0) if seeds else []
    chosen: list[tuple[Group, Run]] = []
    for group in comparison.groups:
        able = [run for run in group.runs if run.sample_grids]
        matching = [run for run in able if common and run.seed == common[0]]
        chosen += [(group, run) for run in (matching or able)[:1]]
    stages = _stages([run for _, run in chosen])
    rows = []
    for stage in stages:
        figures = []
        for group, run in chosen:
            grid = next((grid for grid in reversed(run.sample_grids) if stage is None or grid.images == stage), None)
            if grid is not None:
                figures.append(_sample_figure(group, styles[group.label], run, grid))
        rows.append((None if stage is None else formats.count(stage), figures))
    return {
        "rows": rows,
        "seed": common[0] if common else None,
        "same": _same_layout([run for _, run in chosen]) and bool(common),
        "labels": _label_text(chosen[0][1]) if chosen else "",
    }


def _stages(runs: Sequence[Run]) -> list[int | None]:
    """Return the numbers of images at which to show grids: the last common one, then two earlier ones."""
    if not runs:
        return []
    shared = sorted(set.intersection(*({grid.images for grid in run.sample_grids} for run in runs)))
    if not shared:
        return [None]
    earlier = sorted({shared[len(shared) // 4], shared[len(shared) // 2]} - {shared[-1]}, reverse=True)
    return [shared[-1], *earlier]


def _sample_figure(group: Group, style: Style, run: Run, grid: SampleGrid) -> SampleFigure:
    source = "data:image/png;base64," + base64.b64encode(grid.file.read_bytes()).decode("ascii")
    return SampleFigure(group, style, source, f"{formats.count(grid.images)} images, seed {run.seed}")


def _same_layout(runs: Sequence[Run]) -> bool:
    layouts = {(grid.rows, grid.columns, str(grid.labels)) for run in runs for grid in run.sample_grids[-1:]}
    return len(layouts) <= 1


def _label_text(run: Run) -> str:
    """Return the labels of a run's grid in words, row by row, columns alone where all rows are alike."""
    grid = run.sample_grids[-1]
    if not grid.labels or not grid.columns:
        return ""
    classes = class_names(run)
    names = [
        str(classes[label]) if isinstance(label, int) and 0 <= label < len(classes) else formats.plain(label)
        for label in grid.labels
    ]
    rows = [names[start : start + grid.columns] for start in range(0, len(names), grid.columns)]
    if all(len(set(row)) == 1 for row in rows):
        return "rows from the top: " + ", ".join(row[0] for row in rows)
    if all(row == rows[0] for row in rows):
        return "columns from the left: " + ", ".join(rows[0])
    return "row by row: " + "; ".join(", ".join(row) for row in rows)


def class_names(run: Run) -> list[Any]:
    """Return the names of the classes, empty where the run did not record them."""
    data = run.info.get("data", {})
    return next((data[key] for key in ("class_names", "classes") if isinstance(data.get(key), list)), [])


def difference_grid(comparison: Comparison, styles: dict[str, Style]) -> Grid | None:
    """Return the table of configuration keys that differ between groups."""
    if not comparison.differences:
        return None
    rows = tuple(
        (Head(key), tuple(Cell(formats.plain(values[group.label])) for group in comparison.groups))
        for key, values in comparison.differences.items()
    )
    return _oriented(Grid(_group_heads(comparison.groups, styles), rows))


def shared_configuration(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Return the configuration that every group has in common."""
    first, *others = [experiment_settings(group.runs[0]) for group in groups]
    return [
        (key, formats.plain(value))
        for key, value in first.items()
        if all(key in other and repr(other[key]) == repr(value) for other in others)
    ]


def environments(groups: Sequence[Group]) -> list[tuple[list[tuple[str, str]], list[str]]]:
    """Return each environment that runs were trained in (versions, machine, data), with the runs' names."""
    found: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for group in groups:
        for run in group.runs:
            data = run.info.get("data", {})
            classes = data.get("classes")
            facts = {
                **{key: run.info.get(key) for key in ("vrpo", "torch", "python", "machine", "device")},
                "data": data.get("path"),
                "data fingerprint": str(data["fingerprint"])[:16] if data.get("fingerprint") else None,
                "images": formats.count(number(data["images"])) if "images" in data else None,
                "classes": len(classes) if isinstance(classes, list) else classes,
            }
            key = tuple((name, str(value)) for name, value in facts.items() if value is not None)
            found.setdefault(key, []).append(run.path.name)
    return [(list(key), names) for key, names in found.items()]


def commands(comparison: Comparison) -> list[str]:
    """Return the commands that train the runs again and make this report."""
    runs = [run for group in comparison.groups for run in group.runs]
    lines = [
        f"vrpo train --config {shlex.quote(str(run.path / 'config.yaml'))} --out {shlex.quote(f'{run.path}-again')}"
        for run in runs
    ]
    folders = " ".join(shlex.quote(str(run.path)) for run in runs)
    return [*lines, f"vrpo compare {folders} --out {shlex.quote(str(comparison.report))}"]
