"""Fixtures that several tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# The tests' tensors are tiny: more threads only wait for each other. Set before torch starts, and for subprocesses.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

REPOSITORY = Path(__file__).resolve().parent.parent


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
