"""Images of a run: sample i is a function of (seed, i), whatever else is drawn beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vrpo.config import RunConfig
from vrpo.config_load import validate
from vrpo.errors import ConfigError
from vrpo.models.transformer import DiffusionTransformer, build_transformer
from vrpo.sampling import ImageSampler, grid_image, image_format, sample_labels, write_images


def network(kind: str = "SiT", num_classes: int = 4) -> DiffusionTransformer:
    built = build_transformer(f"{kind}-N/4", input_size=8, in_channels=3, num_classes=num_classes)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return built.eval()


def config(sampler: str, batch_size: int, guidance: float = 1.0) -> RunConfig:
    sample = {"sampler": sampler, "steps": 4, "batch_size": batch_size, "guidance_scale": guidance}
    return validate({"sample": sample}, "the test")


@pytest.mark.parametrize(
    ("kind", "sampler"), [("SiT", "ode-euler"), ("SiT", "ode-heun"), ("SiT", "sde"), ("DiT", "ddim"), ("DiT", "ddpm")]
)
def test_sample_is_the_same_whatever_the_batch(kind: str, sampler: str) -> None:
    trunk = network(kind)
    indices = [0, 1, 2, 3, 4, 5, 6]
    labels = sample_labels(indices, 4, "balanced", 0)
    assert labels is not None
    whole = ImageSampler(trunk, config(sampler, 7, 1.5), device="cpu").images(indices, labels, seed=3)
    split = ImageSampler(trunk, config(sampler, 2, 1.5), device="cpu").images(indices, labels, seed=3)
    # Products of another batch size may round differently: one level of 255 at most.
    assert (whole.int() - split.int()).abs().max() <= 1
    alone = ImageSampler(trunk, config(sampler, 7, 1.5), device="cpu").images([5], labels[5:6], seed=3)
    assert (whole[5].int() - alone[0].int()).abs().max() <= 1
    assert not torch.equal(whole[0], whole[4]), "samples of one class differ by their noise"
    other = ImageSampler(trunk, config(sampler, 7, 1.5), device="cpu").images(indices, labels, seed=4)
    assert not torch.equal(whole, other)


def test_how_many_are_asked_for_changes_nothing() -> None:
    sampler = ImageSampler(network(), config("ode-euler", 4), device="cpu")
    few = sampler.images(range(5), sample_labels(range(5), 4, "random", 9), seed=9)
    many = sampler.images(range(10), sample_labels(range(10), 4, "random", 9), seed=9)
    assert torch.equal(few, many[:5])


def test_label_policies() -> None:
    balanced = sample_labels(range(40), 4, "balanced", 0)
    assert balanced is not None
    assert balanced.bincount().tolist() == [10, 10, 10, 10]
    random = sample_labels(range(4000), 4, "random", 0)
    assert random is not None
    # Four standard deviations of a binomial around 1,000.
    assert (random.bincount() - 1000).abs().max() < 4 * (4000 * 0.25 * 0.75) ** 0.5
    assert torch.equal(random[100:200], sample_labels(range(100, 200), 4, "random", 0))  # type: ignore[arg-type]
    assert sample_labels(range(4), 0, "balanced", 0) is None


def test_sampler_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sample.sampler 'ddpm' does not fit SiT: choose one of: ode-euler"):
        ImageSampler(network(), config("ddpm", 4), device="cpu")


def test_guidance_needs_classes() -> None:
    sampler = ImageSampler(network(num_classes=0), config("ode-euler", 4, 2.0), device="cpu")
    with pytest.raises(ConfigError, match="guidance_scale"):
        sampler.images(range(2), None, seed=0)


def test_grid_and_files_hold_the_pixels(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    sheet = grid_image(images, columns=2)
    assert sheet.shape == (14, 9, 3)
    assert (sheet[5:9, 5:9] == images[3].permute(1, 2, 0).numpy()).all()
    assert (sheet[4] == 255).all()
    write_images(images, None, tmp_path / "folder", 2)
    assert (np.asarray(Image.open(tmp_path / "folder" / "000004.png")) == images[4].permute(1, 2, 0).numpy()).all()
    with pytest.raises(ConfigError, match="neither a folder nor"):
        write_images(images, None, tmp_path / "deep" / "images.jpg", 2)
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("name", "kind"), [("grid.png", "png"), ("images.npz", "npz"), ("new", "folder"), ("there.v2", "folder")]
)
def test_path_decides_the_format(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "there.v2").mkdir()
    assert image_format(tmp_path / name) == kind
