"""A tiny prepared data set and configurations small enough to train in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import CLASSES, pictures

from vrpo.config import RunConfig
from vrpo.config_load import merge, validate
from vrpo.data.prepare import prepare
from vrpo.data.sources import ArraySource


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A training and a held-out data set."""
    folder = tmp_path_factory.mktemp("data")
    for name, count, seed in (("training", 90, 0), ("held-out", 30, 1)):
        images, labels = pictures(count, seed)
        prepare(ArraySource(images, labels, CLASSES, name), folder / name, size=16, workers=1, progress=False)
    return folder / "training", folder / "held-out"


@pytest.fixture
def make_config(data: tuple[Path, Path]) -> Any:
    """Return a function from overrides to a configuration of a tiny run."""

    def make(**over: Any) -> RunConfig:
        values = {
            "data": {"path": str(data[0]), "validation": str(data[1])},
            "model": {"name": "SiT-N/4"},
            "encoder": {"name": "resnet10t", "weights": "random", "feature": 1, "input_size": 16},
            "align": {"objective": "none", "projector_width": 64, "depth": 2},
            "train": {"images": 96, "batch_size": 8, "lr": 1e-3, "ema": 0.9, "log_every": 16, "device": "cpu"},
            "sample": {"steps": 3, "rows": 1, "columns": 3, "batch_size": 8},
        }
        return validate(merge(values, over), "the test")

    return make
