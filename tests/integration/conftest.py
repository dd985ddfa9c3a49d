"""A prepared data set and a finished run."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import tiny_config, tiny_data

from vrpo.training.trainer import train


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``data`` (token cache included), ``run`` and the hidden features of neither."""
    folder = tmp_path_factory.mktemp("finished")
    train(tiny_config(tiny_data(folder / "data"), sample_every=16), folder / "run", say=lambda sentence: None)
    return folder
