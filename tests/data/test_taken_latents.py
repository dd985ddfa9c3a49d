"""Latents that were taken over: which autoencoder may decode them, and what is known of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from pictures import encode, noise_image

from autoencoder_files import save_autoencoder, save_tiny
from latent_sources import write_lightning, write_repa
from vrpo.cli import main
from vrpo.data.latents import LatentOptions
from vrpo.data.prepare import prepare
from vrpo.data.shards import ShardedDataset
from vrpo.decoding import load_decoder
from vrpo.errors import ConfigError


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Autoencoders: "kl" made the latents, others have its shape."""
    folder = tmp_path_factory.mktemp("models")
    save_autoencoder(folder / "kl", shift_factor=0.0)
    save_autoencoder(folder / "vae2", seed=3)
    save_tiny(folder / "tiny")
    shutil.copytree(folder / "kl", folder / "sd-vae-ft-mse")
    shutil.copytree(folder / "kl", folder / "pipeline" / "sd-vae-ft-mse" / "vae")
    return folder


@pytest.fixture(scope="module")
def taken(models: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    folder = tmp_path_factory.mktemp("taken")
    write_repa(folder / "repa", [encode(noise_image(seed, 16, 16)) for seed in range(3)], models / "kl")
    prepare(folder / "repa", folder / "out", size=16, workers=1, progress=False)
    return ShardedDataset(folder / "out")


def decoder(dataset: ShardedDataset, named: Path, *, any_decoder: bool = False) -> object:
    normaliser = dataset.manifest.normaliser
    return load_decoder(dataset.latents, normaliser, named=str(named), any_decoder=any_decoder, device="cpu")


def test_latents_whose_weights_are_unknown_are_decoded_by_the_recorded_name(
    taken: ShardedDataset, models: Path
) -> None:
    for folder in ("sd-vae-ft-mse", "pipeline/sd-vae-ft-mse"):
        decoder(taken, models / folder)
    with pytest.raises(ConfigError) as caught:
        decoder(taken, models / "vae2")
    assert str(caught.value) == (
        f"the latents are said to be of 'sd-vae-ft-mse', with weights that are not known, and '{models / 'vae2'}' has "
        "another name: give that one, in a folder of its name, or say --sample.any-decoder True (--any-decoder) if "
        "this one made them; 'vrpo prepare --latents' compares them and records its weights."
    )
    decoder(taken, models / "vae2", any_decoder=True)


def test_mean_and_deviation_are_not_those_of_an_autoencoder_without(taken: ShardedDataset, models: Path) -> None:
    shutil.copytree(models / "tiny", models / "tiny2" / "sd-vae-ft-mse")
    with pytest.raises(ConfigError, match="gives one value and no mean and standard deviation"):
        decoder(taken, models / "tiny2" / "sd-vae-ft-mse")
    decoder(taken, models / "tiny", any_decoder=True)


def test_the_commands_refuse_it_in_one_sentence(
    taken: ShardedDataset, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "browse", str(taken.path), "--html", str(tmp_path / "page.html"), "--decode", "--device", "cpu"]
    for name, more, code in (("vae2", [], 2), ("tiny", [], 2), ("vae2", ["--any-decoder"], 0)):
        with pytest.raises(SystemExit) as stop:
            main([*words, "--decoder", str(models / name), *more])
        assert (stop.value.code or 0) == code
    assert capsys.readouterr().err.count("\n") == 2


def test_latents_without_images_are_not_said_to_be_compared(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of LightningDiT's there is nothing to compare: the name is kept, and no hash of weights that may be others."""
    write_lightning(tmp_path / "latents", channels=4)
    told = LatentOptions(str(models / "vae2"))
    made = prepare(tmp_path / "latents", tmp_path / "out", size=8, workers=1, progress=False, latents=told)
    assert f"is taken to be '{models / 'vae2'}', and they were not compared with it." in made.summary()
    dataset = ShardedDataset(tmp_path / "out")
    assert dataset.latents is not None
    assert (dataset.latents.autoencoder, dataset.latents.weights) == (str(models / "vae2"), None)
    with pytest.raises(SystemExit):
        main(["data", "info", str(tmp_path / "out")])
    assert f"of '{models / 'vae2'}' (as was said; its weights are not known)" in capsys.readouterr().out
    decoder(dataset, models / "vae2")
    with pytest.raises(ConfigError, match="has another name"):
        decoder(dataset, models / "kl")
    bare = tmp_path / "bare"
    prepare(tmp_path / "latents", bare, size=8, workers=1, progress=False)
    assert torch.is_tensor(decoder(ShardedDataset(bare), models / "kl")(torch.zeros(1, 4, 4, 4)))  # type: ignore[operator]
