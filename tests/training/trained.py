"""Training a tiny run, and reading what it left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vrpo.training.trainer import Trainer, TrainResult


def run(config: Any, folder: Path, **options: Any) -> TrainResult:
    return Trainer(config, folder, say=lambda sentence: None, **options).train()


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(folder: Path) -> list[float]:
    return [record["denoising"] for record in records(folder, "train")]


def weights(folder: Path, part: str = "model") -> dict[str, torch.Tensor]:
    name = (folder / "checkpoints" / "latest").read_text()
    return load_file(folder / "checkpoints" / name / f"{part}.safetensors")


def assert_same(first: Path, second: Path) -> None:
    for part in ("model", "ema", "objective", "optimizer"):
        a, b = weights(first, part), weights(second, part)
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), (part, name)
