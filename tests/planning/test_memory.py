"""The planned memory against the bytes that the real trainer holds at its peak."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vrpo.config import RunConfig
from vrpo.config_load import merge, validate
from vrpo.data.prepare import prepare
from vrpo.data.sources import ArraySource
from vrpo.planning.live_bytes import LiveBytes
from vrpo.planning.plan import DataFacts, make_plan
from vrpo.planning.trace import DataShape
from vrpo.training.trainer import Trainer

CLASSES = ("a", "b", "c")
SHAPE = DataShape(image_size=16, input_size=16, in_channels=3, num_classes=3)
TOLERANCE = 0.1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "noise"
    images = np.random.default_rng(0).integers(0, 256, (48, 16, 16, 3), dtype=np.uint8)
    prepare(ArraySource(images, np.arange(48) % 3, CLASSES, "noise"), folder, size=16, workers=1, progress=False)
    return folder


def configuration(data: Path, over: dict[str, Any]) -> RunConfig:
    values = {
        "data": {"path": str(data)},
        "model": {"name": "SiT-Ti/2"},
        "encoder": {"name": "vit_tiny_patch16_224", "weights": "random"},
        "align": {"projector_width": 256, "vrpo": {"warmup": 0.0}},
        "train": {"images": 96, "batch_size": 16, "device": "cpu"},
    }
    return validate(merge(values, over), "the test")


def measured_peak(config: RunConfig, run: Path) -> int:
    """Return the most bytes of tensors alive in the second and third step of the trainer, networks included."""
    gc.collect()
    with LiveBytes() as live:
        trainer = Trainer(config, run, say=lambda sentence: None)
        trainer.parts.trunk.train()
        trainer._train_step(trainer.loader.batch(0))
        live.peak = live.live
        for step in (1, 2):
            trainer._train_step(trainer.loader.batch(step))
    return live.peak


DISTANCE = {
    "kind": "encoder",
    "network": "resnet10t",
    "network_weights": "random",
    "input_size": 64,
    "start": 0.0,
    "max_time": 1.0,
    "fraction": 1.0,
}
CASES: list[tuple[dict[str, Any], bool]] = [
    ({"align": {"objective": "none"}}, True),
    ({"align": {"objective": "repa"}}, False),
    ({"align": {"objective": "repa"}, "train": {"precision": "bf16"}}, True),
    ({"align": {"objective": "repa"}, "model": {"checkpoint_blocks": True}}, True),
    ({"align": {"objective": "repa"}, "train": {"micro_batch": 4, "noisings": 2}}, False),
    ({"align": {"objective": "irepa"}}, False),
    ({"align": {"objective": "haste"}}, False),
    ({"align": {"objective": "vrpo"}}, False),
    ({"align": {"objective": "vrpo"}, "train": {"precision": "bf16", "micro_batch": 8, "noisings": 4}}, True),
    ({"align": {"objective": "reg"}}, False),
    ({"align": {"objective": "repi"}}, False),
    ({"align": {"objective": "none", "perceptual_image": DISTANCE}}, True),
    ({"align": {"objective": "none"}, "model": {"name": "DiT-Ti/2"}, "sample": {"sampler": "ddim"}}, False),
]


def case_name(over: dict[str, Any]) -> str:
    values = (value for part in over.values() for value in part.values())
    return "-".join("distance" if value is DISTANCE else str(value) for value in values).replace("/", "")


@pytest.mark.parametrize(
    "over",
    [pytest.param(over, id=case_name(over), marks=() if quick else pytest.mark.soak) for over, quick in CASES],
)
def test_the_planned_memory_is_what_training_takes(data: Path, tmp_path: Path, over: dict[str, Any]) -> None:
    config = configuration(data, over)
    facts = DataFacts(SHAPE, images=48, flips=False, latents=False)
    memory = make_plan(config, facts, count=1, reduced_encoders=False).memory
    measured = measured_peak(config, tmp_path / "run")
    print(f"planned {memory.total / 1e6:.2f} MB, measured {measured / 1e6:.2f} MB, {memory.total / measured - 1:+.2%}")
    assert abs(memory.total / measured - 1) < TOLERANCE
    assert memory.activations > 0.1 * memory.total  # what is predicted is not the weights alone
