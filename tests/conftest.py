"""Fixtures that several tests share."""

from __future__ import annotations

import importlib.util
import json
import os
from datetime import date
from pathlib import Path
from typing import Any

import pytest

# The tests' tensors are tiny: more threads only wait for each other. Set before torch starts, and for subprocesses.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
SOAK = pytest.StashKey[dict[str, dict[str, Any]]]()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and networks; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("VRPO_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "cifar10-test.zip").is_file():
        pytest.skip(f"no real data at {folder}: set VRPO_SHARED_DATA to the folder that holds cifar10-test.zip")
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak-record",
        type=Path,
        help="file to which the outcomes of soak tests are added, such as benchmarks/results/soak.json",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SOAK] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Keep what a soak test came to: its outcome, its seconds and what it recorded of itself."""
    report = yield
    if item.get_closest_marker("soak") and (report.when == "call" or report.failed):
        item.config.stash[SOAK][item.nodeid] = {
            "outcome": report.outcome,
            "seconds": round(report.duration, 1),
            **dict(item.user_properties),
        }
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    file, found = session.config.getoption("--soak-record"), session.config.stash[SOAK]
    if not file or not found:
        return
    spec = importlib.util.spec_from_file_location("machine", REPOSITORY / "benchmarks" / "machine.py")
    machine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(machine)
    told = machine.describe(torch.device("cpu"))
    run = {"date": date.today().isoformat(), **{name: told[name] for name in ("processor", "cores", "python", "torch")}}
    known = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    known |= {name: {**record, **run} for name, record in found.items()}
    file.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", encoding="utf-8")
