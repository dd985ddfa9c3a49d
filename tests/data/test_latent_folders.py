"""The folders of REPA and LightningDiT: matched by key, and one sentence where they do not match."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encode, noise_image
from safetensors.torch import save_file
from source_files import COUNT, assert_rows, make, write_tar

from autoencoder_files import save_autoencoder
from latent_sources import write_lightning, write_repa
from vrpo.data.latents import LatentOptions
from vrpo.data.prepare import prepare
from vrpo.data.sources import open_source
from vrpo.data.transforms import decode
from vrpo.errors import ConfigError, DataError
from vrpo.vision.autoencoders import load_autoencoder


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_autoencoder(tmp_path_factory.mktemp("autoencoder") / "kl", shift_factor=0.0)


def test_repa_folder(files: list[bytes], autoencoder: Path, tmp_path: Path) -> None:
    source = write_repa(tmp_path / "repa", files, autoencoder)
    dataset = make(source, tmp_path / "out", workers=2)
    assert_rows(dataset, files, list(range(COUNT)), [i % 3 for i in range(COUNT)])
    assert dataset.latents is not None
    assert (dataset.latents.autoencoder, dataset.latents.weights) == ("sd-vae-ft-mse", None)
    again = prepare(source, tmp_path / "again", size=16, workers=1, progress=False).summary()
    assert (
        "Which autoencoder made the latents is taken to be 'sd-vae-ft-mse': to say it, prepare with --latents." in again
    )
    assert dataset.manifest.normaliser is not None
    assert dataset.manifest.normaliser.scale == (0.18215,) * 4
    network = load_autoencoder(str(autoencoder))
    expected = network.encode(torch.from_numpy(np.stack([decode(content, 16)[0] for content in files])))
    torch.testing.assert_close(dataset.read_latents(np.arange(COUNT)).float(), expected, rtol=2**-10, atol=1e-4)
    bare = make(write_repa(tmp_path / "bare", files, autoencoder, images=False), tmp_path / "bare-out")
    assert not bare.holds_pixels
    assert torch.equal(bare.read_latents(np.arange(COUNT)), dataset.read_latents(np.arange(COUNT)))


def test_repa_latents_are_held_against_the_named_autoencoder(
    files: list[bytes], autoencoder: Path, tmp_path: Path
) -> None:
    source = write_repa(tmp_path / "repa", files, autoencoder)
    told = make(source, tmp_path / "out", latents=LatentOptions(str(autoencoder)))
    assert told.latents is not None
    assert told.latents.weights == load_autoencoder(str(autoencoder)).fingerprint
    assert told.manifest.normaliser is not None
    assert told.manifest.normaliser.scale == (0.5,) * 4
    other = save_autoencoder(tmp_path / "other", seed=3)
    with pytest.raises(DataError, match=r"of another autoencoder than .*other': those of '00000/img00000000' differ"):
        make(source, tmp_path / "new", latents=LatentOptions(str(other)))
    with pytest.raises(ConfigError, match="no latents of mirror images"):
        make(source, tmp_path / "new", flip=True)
    with pytest.raises(ConfigError, match="8 x 8, and --size 20 is no multiple"):
        make(source, tmp_path / "new", size=20)
    with pytest.raises(ConfigError, match="were made from, 16 x 16 pixels, and not 32 x 32: give --size 16"):
        make(source, tmp_path / "new", size=32)
    assert not (tmp_path / "new").exists()
    (source / "images" / "00000" / "img00000002.png").write_bytes(encode(noise_image(0, 32, 32)))
    bad = make(source, tmp_path / "mixed").manifest.bad
    assert [(image.key, image.reason) for image in bad] == [
        ("00000/img00000002", "it is 32 x 32 pixels and not 16 x 16")
    ]


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("images/00000/img00000003.png", "has the latent '00000/img00000003' and no image of that name"),
        ("vae-sd/00000/img-mean-std-00000003.npy", "has the image '00000/img00000003' and no latent of that name"),
    ],
)
def test_repa_mismatches_are_named(
    files: list[bytes], autoencoder: Path, tmp_path: Path, lost: str, words: str
) -> None:
    source = write_repa(tmp_path / "repa", files, autoencoder)
    (source / lost).unlink()
    with pytest.raises(DataError, match=words):
        open_source(source)


def test_names_in_json_may_hold_half_a_character(files: list[bytes], autoencoder: Path, tmp_path: Path) -> None:
    members = {}
    for i in range(3):
        members |= {f"{i}.png": files[i], f"{i}.json": json.dumps({"label": f"{i % 2} \ud800"}).encode()}
    dataset = make(write_tar(tmp_path / "images.tar", members), tmp_path / "out")
    assert dataset.class_names == (r"0 \xed\xa0\x80", r"1 \xed\xa0\x80")
    source = write_repa(tmp_path / "repa", files, autoencoder)
    (source / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": [["00000/\ud800.npy", 0]]}))
    with pytest.raises(DataError, match=r"has the label '00000/\\xed\\xa0\\x80' and no latent of that name"):
        open_source(source)


def test_repa_damage_is_named(files: list[bytes], autoencoder: Path, tmp_path: Path) -> None:
    source = write_repa(tmp_path / "repa", files, autoencoder)
    cut = source / "vae-sd" / "00000" / "img-mean-std-00000003.npy"
    cut.write_bytes(cut.read_bytes()[:-40])
    np.save(cut.with_name("img-mean-std-00000004.npy"), np.array([{}], dtype=object), allow_pickle=True)
    bad = make(source, tmp_path / "out").manifest.bad
    assert [(image.key, image.reason) for image in bad] == [
        ("00000/img00000003", "its latents are cut off"),
        ("00000/img00000004", "its latents are object and not rows of floats"),
    ]
    labels = json.loads((source / "vae-sd" / "dataset.json").read_text())
    (source / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels["labels"][1:]}))
    with pytest.raises(DataError, match="has the latent '00001/img00000011' and no label"):
        open_source(source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lightningdit_folder(tmp_path: Path, dtype: torch.dtype) -> None:
    latents, flips = write_lightning(tmp_path / "latents", dtype)
    dataset = make(tmp_path / "latents", tmp_path / "out", size=64, flip=True, workers=2)
    rows = np.arange(10)
    assert torch.equal(dataset.read_latents(rows), latents.half())
    assert torch.equal(dataset.read_latents(rows, np.ones(10, dtype=bool)), flips.half())
    assert dataset.labels() is not None
    assert list(dataset.labels()) == [i % 5 for i in range(10)]  # type: ignore[arg-type]
    assert (dataset.in_channels, dataset.input_size, dataset.image_size) == (6, 4, 64)
    assert dataset.manifest.normaliser is not None
    both = torch.cat([latents, flips]).half().double()
    torch.testing.assert_close(
        torch.tensor(dataset.manifest.normaliser.scale, dtype=torch.float64),
        1 / both.std((0, 2, 3), correction=0),
    )
    assert dataset.key(5) == "latents_rank00_shard001.safetensors/000001"


def test_lightningdit_statistics_and_damage(tmp_path: Path) -> None:
    folder = tmp_path / "latents"
    write_lightning(folder)
    statistics = {"mean": torch.full((1, 6, 1, 1), 0.5), "std": torch.full((1, 6, 1, 1), 4.0)}
    torch.save(statistics, folder / "latents_stats.pt")
    normaliser = make(folder, tmp_path / "out", size=64).manifest.normaliser
    assert normaliser is not None
    assert (normaliser.shift, normaliser.scale) == ((0.5,) * 6, (0.25,) * 6)
    torch.save({"mean": print}, folder / "latents_stats.pt")
    with pytest.raises(DataError, match="holds no mean and std of 6 channels"):
        open_source(folder)
    (folder / "latents_stats.pt").unlink()
    with pytest.raises(ConfigError, match="does not say how its latents are scaled"):
        make(folder, tmp_path / "new", size=64, latents=LatentOptions(normalise="autoencoder"))
    shard = folder / "latents_rank00_shard001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"shard001.safetensors' is a damaged or incomplete"):
        open_source(folder)
    save_file({"latents": torch.zeros(4, 6, 4, 4), "labels": torch.arange(4)}, shard)
    with pytest.raises(DataError, match=r"shard001.safetensors' holds no 'latents_flip'"):
        open_source(folder)
