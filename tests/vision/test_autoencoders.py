"""Autoencoders: the library's own numbers, told apart by their weights, and refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from autoencoder_files import save_autoencoder, save_tiny
from vrpo.errors import CheckpointError, ConfigError
from vrpo.vision.autoencoders import LatentDecoder, Pixels, load_autoencoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_autoencoder(tmp_path_factory.mktemp("autoencoder") / "kl")


def test_posterior_and_decoding_are_those_of_diffusers(folder: Path) -> None:
    import diffusers

    reference = diffusers.AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    autoencoder = load_autoencoder(str(folder))
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        posterior = reference.encode(pixels.float() / 127.5 - 1).latent_dist
        expected = reference.decode(posterior.mean).sample
    mean, deviation = autoencoder.encode(pixels).chunk(2, dim=1)
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(deviation, posterior.std)
    torch.testing.assert_close(autoencoder.decode(mean), expected)
    assert (autoencoder.channels, autoencoder.downsampling, autoencoder.posterior) == (4, 2, True)
    assert (autoencoder.shift, autoencoder.scale) == (0.25, 0.5)


def test_autoencoder_tiny_gives_one_value(tmp_path: Path) -> None:
    autoencoder = load_autoencoder(str(save_tiny(tmp_path / "tiny")))
    latents = autoencoder.encode(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    assert latents.shape == (2, 4, 8, 8)
    assert (autoencoder.posterior, autoencoder.downsampling) == (False, 2)
    assert autoencoder.decode(latents).shape == (2, 3, 16, 16)


def test_decoder_undoes_the_normalisation(folder: Path) -> None:
    autoencoder = load_autoencoder(str(folder))
    latents = torch.randn(2, 4, 8, 8)
    shift, scale = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([2.0, 1.0, 0.5, 4.0])
    normalised = (latents - shift[:, None, None]) * scale[:, None, None]
    decoder = LatentDecoder(autoencoder, shift, scale)
    torch.testing.assert_close(decoder(normalised), autoencoder.decode(latents), rtol=1e-4, atol=1e-5)
    assert str(folder.parent) not in decoder.description
    assert Pixels()(latents) is latents


def test_batches_of_any_size_decode_alike(folder: Path) -> None:
    autoencoder = load_autoencoder(str(folder))
    latents = torch.randn(35, 4, 8, 8)
    torch.testing.assert_close(autoencoder.decode(latents)[33], autoencoder.decode(latents[33:34])[0])


def test_fingerprint_follows_weights_and_scale_and_not_the_place(folder: Path, tmp_path: Path) -> None:
    import shutil

    def of(path: Path) -> str:
        return load_autoencoder(str(path)).fingerprint

    original = of(folder)
    assert of(Path(shutil.copytree(folder, tmp_path / "copy"))) == original
    pipeline = tmp_path / "pipeline"
    shutil.copytree(folder, pipeline / "vae")
    assert of(pipeline) == original
    assert of(save_autoencoder(tmp_path / "other", seed=1)) != original
    assert of(save_autoencoder(tmp_path / "scaled", scaling_factor=0.75)) != original


def test_what_cannot_be_loaded_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'sd-vae-ft-ema'"):
        load_autoencoder("sd-vae-ft-emma")
    kind = tmp_path / "kind"
    kind.mkdir()
    (kind / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(CheckpointError, match="is a UNet2DModel, which is no autoencoder"):
        load_autoencoder(str(kind))
    damaged = save_autoencoder(tmp_path / "damaged")
    weights = damaged / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    for path in (damaged, tmp_path):
        with pytest.raises(CheckpointError, match="cannot be loaded") as caught:
            load_autoencoder(str(path))
        assert "\n" not in str(caught.value)


def test_latents_that_overflow_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_autoencoder(tmp_path / "wild")
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["quant_conv.weight"] *= 1e9
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="not finite in half precision"):
        load_autoencoder(str(folder)).encode(torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8))
