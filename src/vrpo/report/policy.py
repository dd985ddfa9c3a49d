"""What the policy did inside the trunk, in at most three sentences a group of runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vrpo.report.formats import count
from vrpo.report.telemetry import binned_history, stacked, time_bins
from vrpo.runs import Run, number

_PREFIX = "objective/"


def policy_sentences(runs: Sequence[Run]) -> tuple[str, ...]:
    """Return what scaffold, internalisation and token, then gate, agreement and rewards did; averaged over runs."""
    said = [_scaffold(runs), _gap(runs), _token(runs), _gate(runs), _agreement(runs), _direction(runs)]
    return tuple(sentence for sentence in said if sentence)[:3]


def _scaffold(runs: Sequence[Run]) -> str | None:
    handed = _last_bins(runs, "scaffold_handed_at")
    advantage = binned_history(runs, f"{_PREFIX}scaffold_advantage")
    if handed is None:
        return None
    times = handed[np.isfinite(handed)]
    if not len(times):
        when = "had not handed over to the block when training ended"
    elif times.min() == times.max() and len(times) == len(handed):
        when = f"handed over to the block at {count(int(times[0]))} images"
    else:
        first, last = (_interval(int(pick), len(handed)) for pick in (np.nanargmin(handed), np.nanargmax(handed)))
        left = len(handed) - len(times)
        when = f"handed over to the block from {count(int(times.min()))} images on (at times {first})"
        when += f", with {left} of {len(handed)} time bins left at the end" if left else (
            f" and was done at {count(int(times.max()))} (at times {last})"
        )  # fmt: skip
    if advantage is None:
        return f"The encoder supplied keys and values and {when}."
    peak = np.where(np.isfinite(advantage.values), advantage.values, -np.inf).max(axis=1)
    where = int(np.argmax(peak))
    gained = f"{peak[where]:.3g} of denoising loss at most (at times {_interval(where, len(peak))})"
    ruled = _last_bins(runs, "scaffold_ruled")
    if ruled is None or not len(times) or ruled[np.isfinite(handed)].all():
        return f"The encoder supplied keys and values while that gained, {gained}, and {when}."
    limited = int((ruled[np.isfinite(handed)] < 1).sum())
    return (
        f"The encoder supplied keys and values, which gained {gained}, and {when}; in {limited} of {len(handed)} time "
        "bins the limit align.scaffold.latest ended this, not the rule."
    )


def _gap(runs: Sequence[Run]) -> str | None:
    ends = _ends(runs, "scaffold_gap")
    if ends is None:
        return None
    return (
        f"Once the block was on its own, the mean square between its keys and values and the encoder's went from "
        f"{ends[0]:.3g} to {ends[1]:.3g}."
    )


def _token(runs: Sequence[Run]) -> str | None:
    ends = _ends(runs, "token_loss")
    if ends is None:
        return None
    sentence = f"The velocity loss of the representation token went from {ends[0]:.3g} to {ends[1]:.3g}"
    evenness = binned_history(runs, f"{_PREFIX}token_evenness")
    if evenness is not None:
        sentence += f", with {np.nanmean(evenness.values):.0%} of an image's noisings counting on average"
    return sentence + "."


def _gate(runs: Sequence[Run]) -> str | None:
    gate = binned_history(runs, f"{_PREFIX}gate")
    if gate is None:
        return None
    by_time = gate.by_time()
    lowest = int(np.nanargmin(by_time))
    if by_time[lowest] > 0.995:
        return "Alignment never disagreed with denoising by enough to be turned down."
    if by_time[lowest] >= 0.95:
        return (
            f"Alignment was hardly turned down: it kept {by_time[lowest]:.0%} at times "
            f"{_interval(lowest, len(by_time))}, and more at all others."
        )
    return (
        f"Alignment was turned down to {np.nanmean(by_time):.0%} on average, most at times "
        f"{_interval(lowest, len(by_time))}, where it kept {by_time[lowest]:.0%}."
    )


def _agreement(runs: Sequence[Run]) -> str | None:
    agreement = binned_history(runs, f"{_PREFIX}agreement")
    if agreement is None:
        return None
    by_time = agreement.by_time()
    most, least = int(np.nanargmax(by_time)), int(np.nanargmin(by_time))
    return (
        f"What the encoder asks of a token agreed with what denoising asks most at times "
        f"{_interval(most, len(by_time))} (cosine {by_time[most]:.2g}) and least at times "
        f"{_interval(least, len(by_time))} ({by_time[least]:.2g})."
    )


def _direction(runs: Sequence[Run]) -> str | None:
    key = f"{_PREFIX}direction_norm"
    lengths = [number(record[key]) for run in runs for record in run.metrics("train") if key in record]
    lengths = [length for length in lengths if np.isfinite(length)]
    if not lengths:
        return None
    return (
        f"The direction on which the rewards agreed had a length of {np.mean(lengths):.2f}, where 1 is full agreement "
        "and 0 is conflict."
    )


def _ends(runs: Sequence[Run], name: str) -> tuple[float, float] | None:
    """Return the first and the last logged value, each the mean over time bins."""
    history = binned_history(runs, f"{_PREFIX}{name}")
    if history is None:
        return None
    values = history.values
    logged = np.flatnonzero(np.isfinite(values).any(axis=0))
    if not len(logged):
        return None
    return float(np.nanmean(values[:, logged[0]])), float(np.nanmean(values[:, logged[-1]]))


def _last_bins(runs: Sequence[Run], name: str) -> np.ndarray | None:
    """Return the newest logged values by time bin, averaged over runs; NaN where a run has none."""
    rows = []
    for run in runs:
        found = [bins for record in run.metrics("train") if (bins := time_bins(record.get(f"{_PREFIX}{name}")))]
        if found:
            rows.append(found[-1])
    return np.mean(stacked(rows), axis=0) if rows else None


def _interval(index: int, bins: int) -> str:
    return f"{index / bins:.2g} to {(index + 1) / bins:.2g}"
