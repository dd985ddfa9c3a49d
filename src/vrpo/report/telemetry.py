"""Telemetry as the report draws it: traces over training, and values by time bin over training."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vrpo.report.curves import Axis
from vrpo.runs import Record, Run, number

Role = Literal["reward mean", "reward spread", "agreement", "gate", "advantage", "supply", "hand-over", "other"]
_PREFIX = "objective/"
_MOST_BINS = 1000


@dataclass(frozen=True)
class Telemetry:
    """What a logged name means: its role, and for a reward which one."""

    name: str
    role: Role
    label: str


def classify(name: str) -> Telemetry:
    """Read the role of an objective's log from the words of its name, such as ``reward_semantic``."""
    words = re.split(r"[/_.\-\s]+", name.removeprefix(_PREFIX).lower())
    label = " ".join(words)
    if words[0] == "token":
        return Telemetry(name, "other", label)
    if {"reward", "rewards", "spread"} & set(words):
        spread = bool({"spread", "std"} & set(words))
        plain = [word for word in words if word not in {"reward", "rewards", "mean", "spread", "std", "by", "time"}]
        return Telemetry(name, "reward spread" if spread else "reward mean", " ".join(plain) or "reward")
    if "scaffold" in words:
        roles: dict[str, Role] = {
            "advantage": "advantage",
            "growth": "advantage",
            "encoder": "supply",
            "at": "hand-over",
            "ruled": "hand-over",
        }
        return Telemetry(name, next((roles[word] for word in words if word in roles), "other"), label)
    if "agreement" in words:
        return Telemetry(name, "agreement", label)
    if {"gate", "omega"} & set(words):
        return Telemetry(name, "gate", label)
    return Telemetry(name, "other", label)


def objective_logs(runs: Sequence[Run]) -> dict[str, bool]:
    """Return the names under ``objective/`` in the training records, and whether each is by time bin."""
    names: dict[str, bool] = {}
    for run in runs:
        for record in run.metrics("train"):
            for key, value in record.items():
                if key.startswith(_PREFIX):
                    names[key] = names.get(key, False) or (isinstance(value, list) and len(value) > 1)
    return names


def dropped_rewards(run: Run) -> dict[str, float]:
    """Return for each reward that was ever dropped, because its value was not finite, for how many tokens."""
    lost: dict[str, float] = {}
    for record in run.metrics("train"):
        for key, value in record.items():
            if key.startswith(f"{_PREFIX}dropped_") and number(value) > 0:
                reward = key.removeprefix(f"{_PREFIX}dropped_")
                lost[reward] = lost.get(reward, 0.0) + number(value)
    return lost


@dataclass(frozen=True)
class Trace:
    """A value over training: positions (images or seconds) and values, both (n,)."""

    positions: np.ndarray
    values: np.ndarray


def trace(run: Run, kind: str, key: str, axis: Axis = "images", points: int = 160) -> Trace:
    """Return a logged value over training; lists are averaged, and long logs in ``points`` stretches."""
    records = run.metrics(kind)
    positions = np.array([number(record.get(axis)) for record in records])
    values = np.array([_mean(record.get(key)) for record in records])
    kept = np.isfinite(positions) & np.isfinite(values) if len(records) else np.zeros(0, bool)
    positions, values = positions[kept], values[kept]
    if len(positions) > points:
        parts = np.array_split(np.arange(len(positions)), points)
        positions = np.array([positions[part].mean() for part in parts])
        values = np.array([values[part].mean() for part in parts])
    return Trace(positions, values)


def mean_trace(traces: Sequence[Trace]) -> Trace | None:
    """Return the mean over seeds at the positions all share, None where they share fewer than two."""
    shared = traces[0].positions
    for other in traces[1:]:
        shared = np.intersect1d(shared, other.positions)
    if len(shared) < 2:
        return None
    rows = [item.values[np.searchsorted(item.positions, shared)] for item in traces]
    return Trace(shared, np.mean(rows, axis=0))


def _mean(value: object) -> float:
    if isinstance(value, list):
        finite = [item for item in map(number, value) if np.isfinite(item)]
        return float(np.mean(finite)) if finite else float("nan")
    return number(value)


@dataclass(frozen=True)
class BinnedHistory:
    """A value by time bin over training: (bins, columns), NaN where nothing was logged, up to ``images``."""

    values: np.ndarray
    images: float

    def by_time(self) -> np.ndarray:
        """Return the mean over training by time bin, (bins,), NaN where a bin was always empty."""
        return _mean_of_logged(self.values, axis=1)


def binned_history(runs: Sequence[Run], key: str, columns: int = 64) -> BinnedHistory | None:
    """Return a value by time bin in equal stretches of training, averaged over runs, None if absent."""
    tables = [rows for run in runs if (rows := _binned_rows(run.metrics("train"), key))]
    if not tables:
        return None
    bins = max(len(values) for rows in tables for _, values in rows)
    end = max(images for rows in tables for images, _ in rows)
    columns = min(columns, max(len(rows) for rows in tables))
    cells: list[list[list[float]]] = [[[] for _ in range(columns)] for _ in range(bins)]
    for rows in tables:
        for images, values in rows:
            column = min(columns - 1, max(0, int(np.ceil(images / end * columns)) - 1))
            for index, value in enumerate(values):
                cells[index][column].append(value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of an empty cell is NaN, as it should be
        means = np.array([[np.nanmean(cell) if cell else np.nan for cell in row] for row in cells])
    return BinnedHistory(means, end) if columns > 1 and np.isfinite(means).any() else None


def _binned_rows(records: Sequence[Record], key: str) -> list[tuple[float, list[float]]]:
    return [
        (number(record["images"]), bins)
        for record in records
        if (bins := time_bins(record.get(key))) and number(record["images"]) > 0
    ]


def time_bins(value: object) -> list[float]:
    """Return a logged value by time bin, NaN where a bin was empty; nothing where it is no list of that kind."""
    return [number(item) for item in value] if isinstance(value, list) and len(value) <= _MOST_BINS else []


def stacked(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Return rows of values by time bin as (rows, bins), with NaN where a row has fewer bins than the longest."""
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table


def last_profile(runs: Sequence[Run], key: str, share: float = 0.2) -> np.ndarray | None:
    """Return a value by time bin, (bins,), averaged over the last ``share`` of records and over runs."""
    profiles: list[list[float]] = []
    for run in runs:
        rows = [values for _, values in _binned_rows(run.metrics("train"), key)]
        if rows:
            profiles += rows[-max(1, round(share * len(rows))) :]
    return _mean_of_logged(stacked(profiles), axis=0) if profiles else None


def _mean_of_logged(values: np.ndarray, axis: int) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing is NaN, as it should be
        return np.asarray(np.nanmean(values, axis=axis))
