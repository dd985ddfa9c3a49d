"""Latent data sets: what the autoencoder gives, stored once, read back by row, in any order of work."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import noise_image

from autoencoder_files import save_autoencoder, save_tiny
from vrpo.data.journal import Finished, Moments
from vrpo.data.latents import LatentOptions, channel_normaliser
from vrpo.data.loader import Loader
from vrpo.data.manifest import ShardRecord
from vrpo.data.prepare import prepare
from vrpo.data.shards import ShardedDataset, verify_dataset
from vrpo.data.sources import ArraySource
from vrpo.errors import ConfigError, DataError
from vrpo.vision.autoencoders import load_autoencoder

COUNT = 23


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.stack([np.asarray(noise_image(seed, 16, 16)) for seed in range(COUNT)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_autoencoder(tmp_path_factory.mktemp("autoencoder") / "kl")


def make(images: np.ndarray, out: Path, autoencoder: Path | None, **options):
    latents = {name: options.pop(name) for name in ("keep_pixels", "normalise", "batch_size") if name in options}
    return prepare(
        ArraySource(images, np.arange(len(images)) % 3, ["a", "b", "c"], "pictures"),
        out,
        **{"size": 16, "shard_bytes": 10 * (768 + 1024), "workers": 1, "progress": False, "flip": True} | options,
        latents=LatentOptions(None if autoencoder is None else str(autoencoder), **latents),
    )


def test_rows_are_the_posteriors_of_the_images(images: np.ndarray, folder: Path, tmp_path: Path) -> None:
    make(images, tmp_path / "out", folder, shard_bytes=10 * (768 + 2048))
    dataset = ShardedDataset(tmp_path / "out")
    autoencoder = load_autoencoder(str(folder))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    expected = torch.stack([autoencoder.encode(pixels), autoencoder.encode(pixels.flip(-1))])
    rows = np.random.default_rng(0).integers(0, COUNT, 60)
    flipped = np.random.default_rng(1).integers(0, 2, 60).astype(bool)
    # Half precision holds eleven bits.
    torch.testing.assert_close(
        dataset.read_latents(rows, flipped).float(), expected[flipped.astype(int), rows], rtol=2**-10, atol=1e-4
    )
    assert torch.equal(dataset.read(rows)[0], pixels[rows])
    assert len(dataset.manifest.shards) == 3
    assert (dataset.in_channels, dataset.input_size, dataset.image_size) == (4, 8, 16)
    record = dataset.latents
    assert record is not None
    assert (record.autoencoder, record.weights) == (str(folder), autoencoder.fingerprint)
    normaliser = dataset.manifest.normaliser
    assert normaliser is not None
    assert (normaliser.shift, normaliser.scale) == ((0.25,) * 4, (0.5,) * 4)
    verify_dataset(tmp_path / "out")


def test_without_pixels_and_without_flips(images: np.ndarray, folder: Path, tmp_path: Path) -> None:
    make(images, tmp_path / "out", folder, keep_pixels=False, flip=False)
    dataset = ShardedDataset(tmp_path / "out")
    assert not dataset.holds_pixels
    with pytest.raises(DataError, match="holds latents without pixels: prepare the images with --keep-pixels, or"):
        dataset.read(np.arange(3))
    with pytest.raises(DataError, match="no latents of mirror images"):
        dataset.read_latents(np.arange(3), np.ones(3, dtype=bool))
    make(images, tmp_path / "pixels", None)
    with pytest.raises(DataError, match="holds no latents"):
        ShardedDataset(tmp_path / "pixels").read_latents(np.arange(3))


def test_channel_statistics_make_samples_of_unit_variance(images: np.ndarray, folder: Path, tmp_path: Path) -> None:
    make(images, tmp_path / "out", folder, normalise="channels")
    dataset = ShardedDataset(tmp_path / "out")
    both = [dataset.read_latents(np.arange(COUNT), np.full(COUNT, side)).double() for side in (False, True)]
    mean, deviation = torch.cat(both).chunk(2, dim=1)
    normaliser = dataset.manifest.normaliser
    assert normaliser is not None
    centre = mean.mean((0, 2, 3))
    variance = mean.var((0, 2, 3), correction=0) + deviation.square().mean((0, 2, 3))
    torch.testing.assert_close(torch.tensor(normaliser.shift, dtype=torch.float64), centre)
    torch.testing.assert_close(torch.tensor(normaliser.scale, dtype=torch.float64), variance.rsqrt())


def test_autoencoder_tiny_is_stored_as_one_value(images: np.ndarray, tmp_path: Path) -> None:
    make(images, tmp_path / "out", save_tiny(tmp_path / "tiny"), flip=False)
    dataset = ShardedDataset(tmp_path / "out")
    assert dataset.read_latents(np.arange(2)).shape == (2, 4, 8, 8)
    assert dataset.latents is not None
    assert not dataset.latents.posterior


def test_interrupted_it_continues_to_the_same_bytes(images: np.ndarray, folder: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done >= 10:
            raise KeyboardInterrupt

    make(images, tmp_path / "whole", folder, normalise="channels", shard_bytes=5 * (768 + 2048))
    with pytest.raises(KeyboardInterrupt):
        make(images, tmp_path / "parts", folder, normalise="channels", shard_bytes=5 * (768 + 2048), progress=interrupt)
    result = make(images, tmp_path / "parts", folder, normalise="channels", shard_bytes=5 * (768 + 2048))
    assert result.resumed_shards == 2
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "parts" / file.name).read_bytes() == file.read_bytes(), file.name


def test_fingerprint_follows_the_autoencoder_and_not_its_place(
    images: np.ndarray, folder: Path, tmp_path: Path
) -> None:
    import shutil

    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    first = make(images, tmp_path / "first", folder).manifest.fingerprint
    assert make(images, tmp_path / "second", moved).manifest.fingerprint == first
    assert make(images, tmp_path / "first", moved).already_complete
    other = save_autoencoder(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match=r"holds latents of the autoencoder .*kl', not .*other'"):
        make(images, tmp_path / "first", other)
    with pytest.raises(DataError, match="holds latents, not pixels alone"):
        make(images, tmp_path / "first", None)
    assert make(images, tmp_path / "channels", folder, normalise="channels").manifest.fingerprint != first


def test_what_does_not_fit_is_one_sentence(images: np.ndarray, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--size 15 is no multiple of 2, .* use 1[46]"):
        make(images, tmp_path / "out", folder, size=15)
    with pytest.raises(ConfigError, match="--normalise is about latents"):
        make(images, tmp_path / "out", None, normalise="channels")
    record = make(images, tmp_path / "tiny", save_tiny(tmp_path / "autoencoder"), flip=False).manifest.latents
    assert record is not None
    constant = Moments(first=(64.0, 0.0, 64.0, 64.0), second=(100.0, 90.0, 64.0, 99.0))
    shard = ShardRecord(file="shard-00000.safetensors", rows=1, bytes=1, sha256="0" * 64)
    counts = {"bad": (), "upscaled": (), "upscaled_count": 0, "class_counts": ()}
    with pytest.raises(DataError, match="channel 2 of the latents is the same everywhere"):
        channel_normaliser([Finished(index=0, shard=shard, moments=constant, **counts)], record, 1)


def test_a_pixel_data_set_is_still_of_format_1(images: np.ndarray, tmp_path: Path) -> None:
    make(images, tmp_path / "out", None)
    content = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert content["version"] == 1
    assert "latents" not in content


def test_the_loader_reads_what_is_asked_for(images: np.ndarray, folder: Path, tmp_path: Path) -> None:
    make(images, tmp_path / "out", folder)
    dataset = ShardedDataset(tmp_path / "out")
    both = Loader(dataset, 16, seed=3, flip=True, latents=dataset).batch(0)
    alone = Loader(dataset, 16, seed=3, flip=True, latents=dataset, pixels=False).batch(0)
    assert alone.pixels is None
    assert both.latents is not None
    assert both.labels is not None
    assert alone.labels is not None
    assert torch.equal(both.labels, alone.labels)
    assert both.flipped.any()
    assert not both.flipped.all()
    assert torch.equal(both.latents, alone.latents)
    # The latents are those of the pixels as they were mirrored.
    assert both.pixels is not None
    expected = load_autoencoder(str(folder)).encode(both.pixels)
    torch.testing.assert_close(both.latents.float(), expected, rtol=2**-10, atol=1e-4)
