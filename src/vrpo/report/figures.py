"""Figures as inline SVG that takes its colours from the page, so that it is legible on light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# (on light, on dark), after Okabe and Ito: told apart under the common colour deficiencies.
PALETTE = (
    ("#5f6672", "#a3abb8"),  # grey: the baseline
    ("#0067b0", "#56b4f2"),
    ("#cc4e00", "#ff8a4c"),
    ("#007f5f", "#2fc79d"),
    ("#a8428a", "#e58bc6"),
    ("#8a6a00", "#e6c040"),
    ("#6a4fc4", "#a995ff"),
    ("#00848f", "#4fd0dc"),
    ("#b3243b", "#ff7b8d"),
)
_PREFERRED = {"none": 0, "repa": 1, "vrpo": 2, "irepa": 3, "haste": 4, "contrastive": 5, "repi": 6, "reg": 7}
_DASHES: tuple[Any, ...] = ("solid", (0, (4, 1.5)), (0, (1.2, 1.2)))
_MARKERS = "os^Dv"

# Colours that stand for a variable of the page's style sheet; they are exchanged in the finished SVG.
_INK, _RULE = "#fd0001", "#fd0002"
_FONT = 8.5


@dataclass(frozen=True)
class Style:
    """How a group is drawn in every figure: a palette slot, a dash and a marker."""

    slot: int
    variant: int = 0

    @property
    def colour(self) -> str:
        """The style sheet's variable for the colour."""
        return f"var(--c{self.slot})"

    @property
    def dash(self) -> str:
        """The dash as SVG's stroke-dasharray."""
        return ("none", "6 2.5", "2 2")[self.variant % 3]


def assign_styles(objectives: Sequence[str]) -> list[Style]:
    """Give each group a style: one colour an objective, dashes for its variants.

    Where an objective has more variants than dashes, every group gets its own colour instead.
    """
    crowded = any(objectives.count(name) > len(_DASHES) for name in objectives)
    names = [f"{index}" for index in range(len(objectives))] if crowded else list(objectives)
    slots: dict[str, int] = {}
    for name in names:
        if name in _PREFERRED:
            slots[name] = _PREFERRED[name]
    free = [slot for slot in range(len(PALETTE)) if slot not in slots.values() and slot] or [0]
    if crowded:
        free = list(range(len(PALETTE)))
    for name in dict.fromkeys(names):
        if name not in slots:
            slots[name] = free[len(slots) % len(free)] if crowded else free.pop(0) if len(free) > 1 else free[0]
    seen: dict[str, int] = {}
    styles = []
    for index, name in enumerate(names):
        styles.append(Style(slots[name], index // len(PALETTE) if crowded else seen.get(name, 0)))
        seen[name] = seen.get(name, 0) + 1
    return styles


@dataclass(frozen=True)
class Line:
    """One curve: points, style, and whether it is a single seed's, drawn thin under the mean."""

    x: Sequence[float]
    y: Sequence[float]
    style: Style
    faint: bool = False
    label: str = ""


def draw_lines(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    markers: bool = False,
    zoom: bool = True,
    zero: bool = False,
) -> str:
    """Draw curves; ``zoom`` leaves the steep first 8% out of the y range, ``zero`` starts y at zero."""
    with _canvas(height=2.5) as (figure, axes):
        for line in lines:
            axes.plot(
                line.x,
                line.y,
                color=_slot_colour(line.style.slot),
                linestyle=_DASHES[line.style.variant % len(_DASHES)],
                linewidth=0.7 if line.faint else 1.6,
                alpha=0.35 if line.faint else 1.0,
                marker=_MARKERS[line.style.slot % len(_MARKERS)] if markers and not line.faint else None,
                markersize=3.2,
                label=line.label if not line.faint else None,
                zorder=2 if line.faint else 3,
                solid_capstyle="round",
            )
        low, high = _y_range(lines, zoom)
        axes.set_ylim(0 if zero else low, high)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(axis="y", color=_RULE, linewidth=0.6)
        axes.margins(x=0.02)
        if x_label == "images":
            axes.xaxis.set_major_formatter(_short_count)
        if any(line.label for line in lines):
            axes.legend(frameon=False, labelcolor=_INK, fontsize=_FONT - 0.5, handlelength=1.6, ncols=2)
        return _svg(figure)


def draw_history(values: np.ndarray, images: float, *, diverging: bool = False, share: bool = False) -> str:
    """Draw values (bins, columns) over images (across) and time (up, 0 = data), with its colour scale.

    ``diverging`` centres the colours on zero; ``share`` makes them dark where a value between 0 and 1 is low.
    """
    finite = values[np.isfinite(values)]
    low, high = (0.0, 1.0) if share else (float(finite.min()), float(finite.max()))
    if diverging:
        high = max(abs(low), abs(high)) or 1.0
        low = -high
    if high <= low:
        high = low + 1e-6
    with _canvas(height=1.75, right=46) as (figure, axes):
        from matplotlib import colormaps

        colours = colormaps["PuOr" if diverging else "Blues_r" if share else "Blues"]
        colours = colours.with_extremes(bad=(0, 0, 0, 0))
        axes.imshow(
            np.ma.masked_invalid(values),
            extent=(0, images, 0, 1),
            origin="lower",
            aspect="auto",
            interpolation="none",
            cmap=colours,
            vmin=low,
            vmax=high,
        )
        axes.set_xlabel("images")
        axes.set_ylabel("time t")
        for spine in axes.spines.values():
            spine.set_visible(True)
        axes.set_yticks([0, 0.5, 1])
        axes.xaxis.set_major_formatter(_short_count)
        scale = axes.inset_axes((1.03, 0, 0.035, 1))
        scale.imshow(
            np.linspace(0, 1, 64)[:, None],
            extent=(0, 1, low, high),
            origin="lower",
            aspect="auto",
            interpolation="none",
            cmap=colours,
        )
        scale.set_xticks([])
        scale.yaxis.tick_right()
        scale.locator_params(axis="y", nbins=4)
        _quiet(scale)
        return _svg(figure)


def time_unit(seconds: float) -> tuple[float, str]:
    """Return how many seconds make the unit that suits this duration, and its axis label."""
    if seconds < 180:
        return 1.0, "training time, seconds"
    return (60.0, "training time, minutes") if seconds < 10_800 else (3600.0, "training time, hours")


def _y_range(lines: Sequence[Line], zoom: bool) -> tuple[float, float]:
    ends = [float(np.nanmax(line.x)) for line in lines if len(line.x)]
    start = 0.08 * max(ends) if zoom and ends else -np.inf
    settled = [y for line in lines for x, y in zip(line.x, line.y, strict=True) if np.isfinite(y) and x >= start]
    if len(settled) < 4 * len(lines):  # too short for a steep start to be told from the rest
        settled = [y for line in lines for y in line.y if np.isfinite(y)]
    if not settled:
        return 0.0, 1.0
    low, high = min(settled), max(settled)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    return low - margin, high + margin


def _slot_colour(slot: int) -> str:
    return f"#fe00{slot % len(PALETTE):02x}"


def _short_count(value: float, _position: object = None) -> str:
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


@contextmanager
def _canvas(height: float, right: float = 8) -> Iterator[tuple[Figure, Axes]]:
    """Open a figure 4 inches wide in the page's style, without pyplot's state; ``right`` is in points."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "vrpo",
        "font.size": _FONT,
        "axes.unicode_minus": True,
        "axes.formatter.useoffset": False,
        "text.parse_math": False,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.0, height))
        # Fixed margins, in points: axes line up from figure to figure, and nothing is drawn twice to be measured.
        width, tall = 72 * 4.0, 72 * height
        figure.subplots_adjust(left=56 / width, right=1 - right / width, bottom=33 / tall, top=1 - 8 / tall)
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        _quiet(axes)
        yield figure, axes


def _quiet(axes: Axes) -> None:
    axes.patch.set_alpha(0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_RULE)
    axes.tick_params(colors=_INK, length=0, labelsize=_FONT)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    axes.set_axisbelow(True)


def _svg(figure: Figure) -> str:
    """Return the figure as an SVG element for HTML: no prologue, no metadata, colours as variables."""
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.S)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r'<svg\b[^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", text, count=1)
    text = re.sub(r"\s?font-family: [^;\"]*;?", "", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r'(<g) id="[^"]*"', r"\1", text)  # nothing refers to groups, and a page holds many figures
    text = text.replace(_INK, "var(--ink-2)").replace(_RULE, "var(--rule)")
    text = re.sub(r"#fe00([0-9a-f]{2})", lambda match: f"var(--c{int(match[1], 16)})", text)
    return re.sub(r"\n\s*", "\n", text)


def with_unique_ids(svg: str, prefix: str) -> str:
    """Return the figure with its identifiers prefixed, so that many figures can share a page."""
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    return re.sub(r'(url\(#|href="#)', rf"\1{prefix}", svg)
