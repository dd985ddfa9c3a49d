"""Killed at any moment, a run resumes, and ends with the weights of an undisturbed one, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")


def kill(*options: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout)


def assert_undisturbed(record: dict[str, Any], kills: int) -> None:
    assert record["kills"] >= kills
    assert record["failed_starts"] == 0, record["failures"]
    assert record["differing_runs"] == 0
    assert record["runs"] > 0
    assert record["at_a_time"] > 0
    assert record["at_a_write"] > 0


def test_a_few_kills() -> None:
    assert_undisturbed(kill("--kills", "5", "--objective", "repa"), 5)


@pytest.mark.soak
def test_a_hundred_kills() -> None:
    record = kill("--kills", "100", "--out", str(ROOT / "benchmarks" / "results"))
    assert_undisturbed(record, 100)
    assert record["while_a_checkpoint_was_written"] >= 10


@pytest.mark.parametrize(("kills", "objective"), [(100, "vrpo"), (40, "repa")])
def test_the_recorded_kills_lost_nothing(kills: int, objective: str) -> None:
    file = ROOT / "benchmarks" / "results" / f"kills-{kills}-{objective}.json"
    record = json.loads(file.read_text())
    assert_undisturbed(record, kills)
    assert record["while_a_checkpoint_was_written"] >= 10
