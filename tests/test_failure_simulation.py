"""The simulation of failures against the closed forms of Young and Daly, and the page against its result file."""

from __future__ import annotations

import json
import random
import runpy
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def benchmark() -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return runpy.run_path(str(ROOT / "benchmarks" / "failure_simulation.py"))
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def mean_wall(benchmark: dict[str, Any], interval: float, stall: float, write: float = 0.0, runs: int = 300) -> float:
    walls = [
        benchmark["simulate"](10_000.0, interval, stall, write, 500.0, 30.0, random.Random(seed)).wall
        for seed in range(runs)
    ]
    return statistics.fmean(walls)


@pytest.mark.parametrize(("interval", "stall"), [(20.0, 2.0), (100.0, 5.0), (250.0, 1.0)])
def test_the_mean_is_daly_s(benchmark: dict[str, Any], interval: float, stall: float) -> None:
    expected = benchmark["expected_wall"](10_000.0, interval, stall, 500.0, 30.0)
    assert mean_wall(benchmark, interval, stall) == pytest.approx(expected, rel=0.03)


def test_the_best_interval_is_young_s(benchmark: dict[str, Any]) -> None:
    best = benchmark["best_interval"](5.0, 500.0)
    assert best == pytest.approx(70.7, abs=0.1)
    around = [mean_wall(benchmark, best * factor, 5.0) for factor in (0.2, 1.0, 5.0)]
    assert around[1] < around[0]
    assert around[1] < around[2]


def test_without_failures_only_stalls_cost(benchmark: dict[str, Any]) -> None:
    outcome = benchmark["simulate"](1000.0, 100.0, 3.0, 50.0, 1e12, 30.0, random.Random(0))
    assert (outcome.wall, outcome.lost, outcome.stalled, outcome.failures) == (1030.0, 0.0, 30.0, 0)


def test_time_is_accounted_for(benchmark: dict[str, Any]) -> None:
    for seed in range(50):
        outcome = benchmark["simulate"](1000.0, 70.0, 3.0, 20.0, 200.0, 30.0, random.Random(seed))
        assert outcome.wall == pytest.approx(1000.0 + outcome.lost + outcome.stalled + outcome.down)


def test_a_checkpoint_counts_when_it_is_written(benchmark: dict[str, Any]) -> None:
    at_once, later = (mean_wall(benchmark, 50.0, 1.0, write) for write in (0.0, 40.0))
    assert later > at_once * 1.02


def test_the_page_shows_the_result_file() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "failure-simulation.json").read_text())
    page = (ROOT / "docs" / "scaling.md").read_text()
    llama, opt = record["rates"]["Llama 3"], record["rates"]["OPT-175B"]
    for slow, fast in zip(llama["asynchronous"], opt["asynchronous"], strict=True):
        row = f"| {slow['interval_minutes']:g} | {slow['lost_hours']:g} | {slow['overhead_percent']:g}% |"
        assert f"{row} {fast['lost_hours']:g} | {fast['overhead_percent']:g}% |" in page
