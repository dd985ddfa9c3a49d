"""Numbers and durations as the report prints them."""

from __future__ import annotations

import math
from typing import Any

from vrpo.report.curves import Interval

MISSING = "–"
_SPACE = "\u00a0"


def decimals(value: float) -> int:
    """Return how many decimals a value of this size is printed with."""
    size = abs(value)
    return 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 4


def score(value: float | None, places: int | None = None, sign: bool = False) -> str:
    """Print a score, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return MISSING
    places = decimals(value) if places is None else places
    text = f"{value:{'+' if sign else ''},.{places}f}"
    return text.replace("-", "−")


def with_interval(value: Interval | None, sign: bool = False, places: int | None = None) -> str:
    """Print a mean and its 95% interval's half-width."""
    if value is None:
        return MISSING
    places = decimals(value.mean) if places is None else places
    text = score(value.mean, places, sign)
    return text if value.half_width is None else f"{text} ± {score(value.half_width, places)}"


def ratio(value: float) -> str:
    """Print a speed-up factor."""
    return f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


def count(value: float | None) -> str:
    """Print a count with thousands separators."""
    return MISSING if value is None or not math.isfinite(value) else f"{round(value):,}"


def percent(value: float | None) -> str:
    """Print a share between 0 and 1."""
    return MISSING if value is None or not math.isfinite(value) else f"{100 * value:.1f}%"


def memory(megabytes: float | None) -> str:
    """Print a size given in MB."""
    if megabytes is None or not math.isfinite(megabytes):
        return MISSING
    return f"{megabytes / 1024:.1f} GB" if megabytes >= 10_240 else f"{megabytes:,.0f} MB"


def duration(seconds: float | None) -> str:
    """Print a duration in its two largest units."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f}{_SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{_SPACE}min {rest:02d}{_SPACE}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}{_SPACE}h {minutes:02d}{_SPACE}min"
    return f"{hours / 24:.1f}{_SPACE}days"


def plain(value: Any) -> str:
    """Print a configuration value."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value) if value else "()"
    return f"{value:g}" if isinstance(value, float) else str(value)
