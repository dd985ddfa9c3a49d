"""Fixtures of the report's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fabricated import fabricate


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that fabricates a run: ``make_run(folder_name, objective, seed, ...)``."""

    def make(folder: str, *args: Any, **settings: Any) -> Path:
        return fabricate(tmp_path / folder, *args, **settings)

    return make
