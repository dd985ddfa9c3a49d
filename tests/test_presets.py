"""The published recipes, as presets: sizes, schedule, sampling, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from vrpo.alignment.build import TrunkShape, build_objective, default_depth
from vrpo.cli import main
from vrpo.config import RunConfig
from vrpo.config_load import build_config, load_preset, validate
from vrpo.data.prepare import prepare
from vrpo.data.shards import ShardedDataset
from vrpo.data.sources import ArraySource
from vrpo.errors import ConfigError
from vrpo.models.transformer import SIZES, build_transformer, parameter_count, parse_model_name
from vrpo.training.data_checks import check_data

# Width, blocks, heads and millions of parameters: table 1 of arXiv 2212.09748; the block that is aligned: 2410.06940.
PUBLISHED = {
    "S": (384, 12, 6, 33, 4),
    "B": (768, 12, 12, 130, 4),
    "L": (1024, 24, 16, 458, 8),
    "XL": (1152, 28, 16, 675, 8),
}
OBJECTIVES = ("none", "repa", "irepa", "haste", "vrpo")
SIDES, KINDS, LETTERS = (256, 512), ("sit", "dit"), ("s", "b", "l", "xl")
BASES = [f"imagenet{side}-{kind}-{letter}-2" for side in SIDES for kind in KINDS for letter in LETTERS]
NAMES = [f"{base}-{objective}" for base in BASES for objective in OBJECTIVES]
# What all of them have in common: REPA's recipe (2410.06940, its appendix and published commands).
RECIPE = {
    "encoder": {"name": "dinov2-vit-b", "cache": False},
    "train": {
        "images": 400_000 * 256,
        "batch_size": 256,
        "lr": 1e-4,
        "lr_warmup": 0,
        "betas": [0.9, 0.999],
        "weight_decay": 0.0,
        "clip": 1.0,
        "ema": 0.9999,
        "precision": "bf16",
    },
    "sample": {"steps": 250, "guidance_scale": 1.8, "guidance_interval": [0.0, 0.7]},
    "diffusion": {"path": "linear", "time": "uniform"},
}


def preset(name: str) -> RunConfig:
    return validate(load_preset(name), name)


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["presets", *words])
    assert not stop.value.code
    return capsys.readouterr().out


def test_every_published_recipe_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(NAMES) == 80
    assert set(NAMES) <= set(shown(capsys).splitlines())


@pytest.mark.parametrize("name", NAMES)
def test_imagenet_presets_are_the_published_recipe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = yaml.safe_load(shown(capsys, name, "--full"))
    series, kind, size, patch, objective = name.split("-")
    side = int(series.removeprefix("imagenet"))
    for section, values in RECIPE.items():
        assert {key: told[section][key] for key in values} == values, section
    model = f"{'SiT' if kind == 'sit' else 'DiT'}-{size.upper()}/{patch}"
    assert (told["name"], told["model"]["name"], told["model"]["label_dropout"]) == (name, model, 0.1)
    assert (told["data"]["image_size"], told["data"]["latent_size"]) == (side, side // 8)
    assert told["sample"]["sampler"] == ("sde" if kind == "sit" else "ddpm")
    assert (told["align"]["objective"], told["align"]["projector_width"]) == (objective, 2048)
    assert told["align"]["weight"] == (1.0 if objective == "irepa" else 0.5)
    assert (told["align"]["haste"]["stop"], told["align"]["haste"]["stop_images"]) == ("fixed", 250_000 * 256)
    width, blocks, heads, _, aligned = PUBLISHED[size.upper()]
    shape = SIZES[size.upper()]
    assert (shape.hidden_size, shape.depth, shape.num_heads) == (width, blocks, heads)
    assert told["align"]["depth"] == []
    assert default_depth(size.upper(), blocks) == aligned


def test_a_preset_is_trained_longer_by_one_option() -> None:
    for steps in (1_000_000, 4_000_000):
        config = build_config(load_preset(NAMES[0]), ["--train.images", str(256 * steps)], NAMES[0])
        assert config.train.images // config.train.batch_size == steps


@pytest.mark.parametrize("base", BASES)
def test_models_and_objectives_are_built_on_the_meta_device(base: str) -> None:
    for objective in OBJECTIVES:
        _build(preset(f"{base}-{objective}"))


def _build(config: RunConfig) -> None:
    _, size, _ = parse_model_name(config.model.name)
    assert config.data.latent_size is not None
    with torch.device("meta"):
        trunk = build_transformer(
            config.model.name, input_size=config.data.latent_size, in_channels=4, num_classes=1000
        )
        objective = build_objective(config.align, TrunkShape.of(trunk, config.model.name), (768,))
    assert parameter_count(trunk) / 1e6 == pytest.approx(PUBLISHED[size][3], abs=1)
    perceptron = (trunk.hidden_size + 1 + 2048 + 1 + 768) * 2048 + 768
    convolution = 9 * trunk.hidden_size * 768 + 768  # iREPA's projector
    expected = {"none": 0, "irepa": convolution}.get(config.align.objective, perceptron)
    more = 0.05 if config.align.objective == "vrpo" else 0  # its gate and statistics
    assert expected <= parameter_count(objective) <= expected * (1 + more)


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
