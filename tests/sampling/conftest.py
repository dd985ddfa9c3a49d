"""Fixtures of the sampling tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from small import make_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small network with four classes."""
    return make_run(tmp_path_factory.mktemp("sampled") / "run")
