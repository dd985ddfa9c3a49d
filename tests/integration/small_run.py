"""A data set and a configuration of a run small enough to be damaged many times over."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vrpo.config import RunConfig
from vrpo.config_load import validate
from vrpo.data.prepare import prepare
from vrpo.data.sources import ArraySource


def tiny_data(folder: Path) -> Path:
    labels = np.arange(24) % 3
    images = np.random.default_rng(0).integers(0, 80, (24, 16, 16, 3)) + 60 * labels[:, None, None, None]
    source = ArraySource(images.astype(np.uint8), labels, ("cat", "dog", "eel"), "noise")
    prepare(source, folder, size=16, workers=1, shard_bytes=16 * 16 * 3 * 10, progress=False)
    return folder


def tiny_config(data: Path, **train_keys: object) -> RunConfig:
    values = {
        "data": {"path": str(data)},
        "model": {"name": "SiT-N/4"},
        "encoder": {"name": "resnet10t", "weights": "random", "feature": 1, "input_size": 16, "cache": True},
        "align": {"objective": "repa", "projector_width": 16, "depth": 2},
        "train": {"images": 32, "batch_size": 8, "checkpoint_every": 16, "log_every": 8, "device": "cpu", **train_keys},
        "sample": {"steps": 2, "rows": 1, "columns": 2},
    }
    return validate(values, "the test")
