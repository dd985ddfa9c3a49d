"""Numbers in words, as sentences of every command say them."""

from __future__ import annotations


def clock(seconds: float) -> str:
    """Return seconds as "1:02:03" or "2:03"."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def counted(count: int, one: str, many: str) -> str:
    """Return "1 image" or "2,000 images"."""
    return f"{count:,} {one if count == 1 else many}"


def sized(count: float) -> str:
    """Return bytes as "469.4 GiB", "12.0 MiB" or "0.5 KiB"."""
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if count >= 2**power:
            return f"{count / 2**power:,.1f} {unit}"
    return f"{count / 2**10:,.1f} KiB"
