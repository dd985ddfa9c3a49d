"""The published recipes, as presets: sizes, schedule, sampling, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vrpo.alignment.build import TrunkShape, build_objective, default_depth
from vrpo.config import RunConfig
from vrpo.config_load import load_preset, preset_names, validate
from vrpo.data.prepare import prepare
from vrpo.data.shards import ShardedDataset
from vrpo.data.sources import ArraySource
from vrpo.errors import ConfigError
from vrpo.models.transformer import SIZES, build_transformer, parameter_count, parse_model_name
from vrpo.training.data_checks import check_data

PUBLISHED = {"S": 33, "B": 130, "L": 458, "XL": 675}  # millions, table 1 of arXiv 2212.09748
DEPTHS = {"S": 4, "B": 4, "L": 8, "XL": 8}
SIZES_OF_PRESETS = ("s", "b", "l", "xl")
BASES = [f"imagenet{px}-{kind}-{size}-2" for px in (256, 512) for kind in ("sit", "dit") for size in SIZES_OF_PRESETS]


def preset(name: str) -> RunConfig:
    return validate(load_preset(name), name)


@pytest.mark.parametrize("name", [f"{base}-{o}" for base in BASES for o in ("none", "repa", "irepa", "haste", "vrpo")])
def test_imagenet_presets_are_the_published_recipe(name: str) -> None:
    config = preset(name)
    kind, size, patch = parse_model_name(config.model.name)
    train, sample = config.train, config.sample
    assert (train.batch_size, train.lr, train.ema, train.precision) == (256, 1e-4, 0.9999, "bf16")
    assert train.images == 400_000 * 256
    assert (config.encoder.name, config.encoder.cache, patch) == ("dinov2-vit-b", False, 2)
    assert (sample.sampler, sample.steps) == ("sde" if kind == "SiT" else "ddpm", 250)
    assert (sample.guidance_scale, sample.guidance_interval) == (1.8, (0.0, 0.7))
    assert config.align.weight == (1.0 if name.endswith("irepa") else 0.5)
    side = 256 if "256" in name else 512
    assert (config.data.image_size, config.data.latent_size) == (side, side // 8)
    assert (config.align.depth or (default_depth(size, SIZES[size].depth),)) == (DEPTHS[size],)


@pytest.mark.parametrize("base", BASES)
def test_models_and_objectives_are_built_on_the_meta_device(base: str) -> None:
    config = preset(f"{base}-repa")
    _, size, _ = parse_model_name(config.model.name)
    assert config.data.latent_size is not None
    with torch.device("meta"):
        trunk = build_transformer(
            config.model.name, input_size=config.data.latent_size, in_channels=4, num_classes=1000
        )
        objective = build_objective(config.align, TrunkShape.of(trunk, config.model.name), (768,))
    assert round(parameter_count(trunk) / 1e6) == pytest.approx(PUBLISHED[size], abs=1)
    assert parameter_count(objective) == (trunk.hidden_size + 1 + 2048 + 1 + 768) * 2048 + 768
    assert base in preset_names()


def test_data_of_another_size_is_refused(tmp_path: Path) -> None:
    images = np.zeros((3, 512, 512, 3), dtype=np.uint8)
    prepare(
        ArraySource(images, np.arange(3), ("a", "b", "c"), "x"), tmp_path / "x", size=512, workers=1, progress=False
    )
    with pytest.raises(ConfigError) as caught:
        check_data(preset("imagenet256-sit-b-2-none"), ShardedDataset(tmp_path / "x"), flip=False)
    sentence = str(caught.value)
    assert sentence.startswith("data.image_size is 256, and the images of ")
    assert "are 512 px: prepare them with --size 256, or use a preset for 512 px." in sentence
