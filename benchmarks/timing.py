"""What the benchmarks of speed share: turns in shuffled order, ratios with intervals, options, result files."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from machine import slug

RESAMPLES = 2_000


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device, burst: int = 1) -> float:
    """Return the seconds of ``work``, over ``burst`` calls in a row where a GPU works behind the host."""
    wait(device)
    started = time.perf_counter()
    for _ in range(burst):
        work()
    wait(device)
    return (time.perf_counter() - started) / burst


def take_turns(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call each of ``runs`` once a round, in an order shuffled every round, and return the seconds they report.

    What disturbs the machine disturbs all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    shuffle = random.Random(0)
    for turn in range(rounds):
        for name in shuffle.sample(list(runs), len(runs)):
            seconds[name].append(runs[name]())
        print(f"round {turn + 1} of {rounds}", file=sys.stderr)
    return seconds


def paired_ratio(seconds: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of the rounds' ratios and its 95% interval, by percentile bootstrap over rounds."""
    return _interval(np.asarray(seconds) / np.asarray(reference))


def paired_difference(seconds: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of the rounds' differences and its 95% interval, by percentile bootstrap over rounds."""
    return _interval(np.asarray(seconds) - np.asarray(reference))


def _interval(values: np.ndarray) -> tuple[float, float, float]:
    picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[picks], axis=1), [2.5, 97.5])
    return round(float(np.median(values)), 4), round(float(low), 4), round(float(high), 4)


def parser_of(
    doc: str | None, cases: Iterable[str], contenders: Sequence[str], **counts: str
) -> argparse.ArgumentParser:
    """Return a parser of the options that benchmarks of several cases and contenders have in common."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--cases", nargs="+", choices=sorted(cases), help="default: what suits the device")
    parser.add_argument("--contenders", nargs="+", choices=list(contenders), default=list(contenders))
    parser.add_argument("--rounds", type=_positive, help="turns that every contender takes")
    for name, explanation in counts.items():
        parser.add_argument(f"--{name}", type=_positive, help=explanation)
    parser.add_argument("--threads", type=_positive, help="threads of torch on the CPU")
    parser.add_argument("--quick", action="store_true", help="a tiny network and few rounds, to try the benchmark")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser


def _positive(word: str) -> int:
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return int(word)


def update_results(folder: Path, name: str, machine: dict[str, Any], results: dict[str, Any]) -> Path:
    """Write a machine's result file; what was measured before and not now is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{slug(machine)}.json"
    known = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**known, **results}, indent=1) + "\n", encoding="utf-8")
    return file
