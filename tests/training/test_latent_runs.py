"""Training on latents and sampling from it, from images to decoded samples."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CLASSES, pictures

from autoencoder_files import save_autoencoder
from vrpo.data.latents import LatentOptions
from vrpo.data.prepare import prepare
from vrpo.data.shards import ShardedDataset
from vrpo.data.sources import ArraySource
from vrpo.errors import ConfigError, DataError
from vrpo.sampling import RunSampler
from vrpo.training.latents import CleanLatents
from vrpo.training.trainer import Trainer
from vrpo.vision.cache import TokenCache


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_autoencoder(tmp_path_factory.mktemp("autoencoder") / "kl")


@pytest.fixture(scope="module")
def latents(autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("latents")
    for name, count, seed in (("training", 48, 0), ("held-out", 12, 1)):
        make(folder / name, count, seed, autoencoder)
    return folder / "training", folder / "held-out"


def make(out: Path, count: int, seed: int, autoencoder: Path, **options: Any) -> Path:
    images, labels = pictures(count, seed)
    source = ArraySource(images, labels, CLASSES, out.name)
    told = LatentOptions(**{"autoencoder": str(autoencoder), "normalise": "channels"} | options)
    prepare(source, out, size=16, flip=True, workers=1, progress=False, latents=told)
    return out


def configure(make_config: Any, latents: tuple[Path, Path], objective: str, **over: Any) -> Any:
    over["data"] = {"path": str(latents[0]), "validation": str(latents[1])} | over.get("data", {})
    over["train"] = {"images": 48, "batch_size": 8, "log_every": 8} | over.get("train", {})
    return make_config(align={"objective": objective}, model={"name": "SiT-N/2"}, **over)


def run(config: Any, folder: Path, **options: Any) -> Trainer:
    trainer = Trainer(config, folder, say=lambda sentence: None, **options)
    trainer.train()
    return trainer


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.mark.parametrize("objective", ["none", "repa"])
def test_train_validate_draw_resume(objective: str, make_config: Any, latents: Any, tmp_path: Path) -> None:
    every = {"sample_every": 24, "validate_every": 24}
    config = configure(make_config, latents, objective, train=every)
    trainer = run(config, tmp_path / "whole")
    assert (trainer.parts.trunk.in_channels, trainer.parts.trunk.input_size) == (4, 8)
    assert len(list((tmp_path / "whole" / "samples").glob("*.png"))) == 3
    validation = records(tmp_path / "whole", "validation")
    assert all(np.isfinite(record["denoising"]) for record in validation)
    half = configure(make_config, latents, objective, train=every | {"images": 24})
    run(half, tmp_path / "parts")
    run(config, tmp_path / "parts", resume=True)
    first, second = ([record["loss"] for record in records(tmp_path / name, "train")] for name in ("whole", "parts"))
    assert first == second
    assert [record["denoising"] for record in records(tmp_path / "parts", "validation")] == [
        record["denoising"] for record in validation
    ]


def test_held_out_latents_are_scaled_as_the_training_data_is(
    make_config: Any, latents: Any, autoencoder: Path, tmp_path: Path
) -> None:
    """The trunk knows one scale: what the held-out data's own statistics are makes no difference."""
    other = make(tmp_path / "held-out", 12, 1, autoencoder, normalise="autoencoder")
    assert ShardedDataset(other).manifest.normaliser != ShardedDataset(latents[1]).manifest.normaliser
    for name, held_out in (("one", latents[1]), ("two", other)):
        config = configure(make_config, (latents[0], held_out), "none", train={"images": 16, "validate_every": 8})
        run(config, tmp_path / name)
    one, two = ([record["denoising"] for record in records(tmp_path / name, "validation")] for name in ("one", "two"))
    assert len(one) > 1
    assert one == two


def test_cached_tokens_are_read_ahead_and_cost_no_pixels(
    make_config: Any, latents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = {"encoder": {"cache": True}, "data": {"validation": None}}
    trainer = Trainer(configure(make_config, latents, "repa", **over), tmp_path / "run", say=lambda sentence: None)
    threads = []
    read = TokenCache.read

    def watched(cache: TokenCache, *args: Any) -> Any:
        threads.append(threading.current_thread().name)
        return read(cache, *args)

    monkeypatch.setattr(TokenCache, "read", watched)
    monkeypatch.setattr(ShardedDataset, "read", lambda *_: pytest.fail("no pixel is needed"))
    trainer.train()
    assert set(threads) == {"vrpo-loader"}
    monkeypatch.undo()
    run(configure(make_config, latents, "repa", data={"validation": None}), tmp_path / "online")
    cached, online = ([r["alignment"] for r in records(tmp_path / name, "train")] for name in ("run", "online"))
    assert cached == pytest.approx(online, abs=2e-3)


@pytest.mark.parametrize(("weight", "wanted"), [(0.0, False), (0.1, True)])
def test_a_reward_that_looks_at_images_gets_them(
    weight: float, wanted: bool, make_config: Any, latents: Any, tmp_path: Path
) -> None:
    align = {"objective": "vrpo", "vrpo": {"perceptual": weight}}
    data = {"path": str(latents[0]), "validation": None}
    config = make_config(align=align, model={"name": "SiT-N/2"}, data=data, encoder={"cache": True})
    trainer = Trainer(config, tmp_path / "run", say=lambda sentence: None)
    assert (trainer.loader.batch(0).pixels is not None) is wanted


def test_samples_decode_by_the_recorded_autoencoder_only(
    make_config: Any, latents: Any, autoencoder: Path, tmp_path: Path
) -> None:
    run(configure(make_config, latents, "none"), tmp_path / "run")
    device = torch.device("cpu")
    sampler = RunSampler(tmp_path / "run", {}, "ema", device)
    images, _ = sampler.draw(5, "balanced", 0)
    assert images.shape == (5, 3, 16, 16)
    assert images.float().std() > 0
    assert sampler.protocol("balanced", 0)["decoder"].startswith("AutoencoderKL kl (")
    other = save_autoencoder(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="is not the one that made the latents"):
        RunSampler(tmp_path / "run", {"decoder": str(other)}, "ema", device)
    told = RunSampler(tmp_path / "run", {"decoder": str(other), "any_decoder": True}, "ema", device)
    assert not torch.equal(told.draw(5, "balanced", 0)[0], images)


def test_latents_are_sampled_scaled_and_shifted(latents: Any) -> None:
    dataset = ShardedDataset(latents[0])
    rows = np.arange(8)
    stored = dataset.read_latents(rows)
    clean = CleanLatents(dataset.latents, dataset.manifest.normaliser, 7, torch.device("cpu"))
    z0 = clean(None, stored, 3, count=8)
    mean, deviation = stored.float().chunk(2, dim=1)
    assert dataset.manifest.normaliser is not None
    shift = torch.tensor(dataset.manifest.normaliser.shift)[:, None, None]
    scale = torch.tensor(dataset.manifest.normaliser.scale)[:, None, None]
    noise = ((z0 / scale + shift) - mean) / deviation
    # 2,048 unit normals: five standard errors.
    assert abs(noise.mean()) < 5 / 2048**0.5
    assert abs(noise.std() - 1) < 5 / (2 * 2048) ** 0.5
    assert torch.equal(z0, clean(None, stored, 3, count=8))
    assert not torch.equal(z0, clean(None, stored, 4, count=8))
    # A process that holds part of the batch draws the same numbers.
    torch.testing.assert_close(clean(None, stored[4:], 3, count=8, start=4), z0[4:], rtol=0, atol=0)


def test_data_that_does_not_fit_is_one_sentence(
    make_config: Any, latents: Any, data: Any, autoencoder: Path, tmp_path: Path
) -> None:
    def refused(error: type[Exception], words: str, objective: str = "none", **over: Any) -> None:
        with pytest.raises(error, match=words):
            run(configure(make_config, latents, objective, **over), tmp_path / "run")

    refused(ConfigError, "data.image_size is 8, and the images of .* are 16 px", data={"image_size": 8})
    refused(ConfigError, "data.latent_size is 4, and .* holds latents of 8 x 8", data={"latent_size": 4})
    pixels = {"path": str(data[0]), "validation": None, "latent_size": 8}
    refused(ConfigError, "data.latent_size is 8, and .* holds no latents", data=pixels)
    refused(DataError, "only one holds latents", data={"validation": str(data[1])})
    other = make(tmp_path / "other-data", 6, 2, save_autoencoder(tmp_path / "other", seed=1))
    refused(DataError, "held-out latents of .* are of another autoencoder", data={"validation": str(other)})
    bare = make(tmp_path / "bare", 6, 2, autoencoder, keep_pixels=False)
    bare_data = {"path": str(bare), "validation": None}
    refused(ConfigError, "holds latents without pixels", objective="repa", data=bare_data)
    bare_held_out = {"validation": str(bare)}
    words = "repa encodes held-out images, and .* holds latents without pixels"
    refused(ConfigError, words, objective="repa", data=bare_held_out, train={"validate_every": 8})
    run(configure(make_config, latents, "repa", data=bare_held_out), tmp_path / "unmeasured-run")
    run(configure(make_config, latents, "none", data=bare_data), tmp_path / "bare-run")
    measured = configure(make_config, latents, "none", data=bare_held_out, train={"validate_every": 8})
    run(measured, tmp_path / "measured-run")
    assert all(record["denoising"] > 0 for record in records(tmp_path / "measured-run", "validation"))
    assert not (tmp_path / "run").exists()


def test_repas_layout_trains_to_the_curve_of_the_images(make_config: Any, autoencoder: Path, tmp_path: Path) -> None:
    from PIL import Image

    from vrpo.vision.autoencoders import load_autoencoder

    images, labels = pictures(24, 5)
    network, told = load_autoencoder(str(autoencoder)), []
    for part in ("images", "vae-sd"):
        (tmp_path / "repa" / part / "00000").mkdir(parents=True)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(image).save(tmp_path / "repa" / "images" / "00000" / f"img{i:08d}.png")
        posterior = network.encode(torch.from_numpy(image).permute(2, 0, 1)[None])[0]
        np.save(tmp_path / "repa" / "vae-sd" / "00000" / f"img-mean-std-{i:08d}.npy", posterior.numpy())
        told.append([f"00000/img-mean-std-{i:08d}.npy", int(label)])
    (tmp_path / "repa" / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": told}))
    options = {"size": 16, "workers": 1, "progress": False, "latents": LatentOptions(str(autoencoder))}
    prepare(tmp_path / "repa", tmp_path / "from-repa", **options)
    prepare(ArraySource(images, labels, CLASSES, "pixels"), tmp_path / "from-pixels", **options)
    curves = []
    for name in ("from-repa", "from-pixels"):
        data = {"path": str(tmp_path / name), "validation": None}
        run(configure(make_config, ("", ""), "repa", data=data), tmp_path / f"run-{name}")
        curves.append([record["loss"] for record in records(tmp_path / f"run-{name}", "train")])
    assert len(curves[0]) == 6
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_tokens_of_a_run_on_latents_are_looked_at(
    latents: tuple[Path, Path], make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Probes need latents and labels alone; CKNNA shows an encoder the pixels kept beside them."""
    from vrpo.commands.representation import cknna, probe

    run(configure(make_config, latents, "none"), tmp_path / "run")
    looking = ["--times", "0", "1", "--depths", "1", "4"]

    assert probe([str(tmp_path / "run"), *looking]) == 0
    words = ["--encoder", "resnet10t", "--encoder-weights", "random", "--data", str(latents[0])]
    assert cknna([str(tmp_path / "run"), *words, *looking]) == 0

    tables = [json.loads(file.read_text()) for file in sorted((tmp_path / "run" / "evaluations").iterdir())]
    assert [table["kind"] for table in tables] == ["CKNNA", "Linear probe accuracy"]
    assert all(np.isfinite(table["values"]).all() for table in tables)
    assert tables[1]["protocol"]["test"] == "held-out"


def test_tokens_are_looked_at_in_latents_of_the_runs_own_kind(
    latents: tuple[Path, Path], make_config: Any, data: Any, autoencoder: Path, tmp_path: Path
) -> None:
    from vrpo.commands.representation import probe

    run(configure(make_config, latents, "none"), tmp_path / "run")

    def probed(name: str, path: Path) -> Any:
        words = [str(tmp_path / "run"), "--data", str(latents[0]), "--test", str(path), "--times", "0", "0.5"]
        probe([*words, "--out", str(tmp_path / name)])
        return json.loads((tmp_path / name).read_text())["values"]

    # Prepared with another normaliser, the same latents reach the trunk at the scale of its training.
    scaled = make(tmp_path / "scaled", 12, 1, autoencoder, normalise="autoencoder")
    assert probed("one.json", latents[1]) == probed("two.json", scaled)
    other = make(tmp_path / "other-data", 12, 1, save_autoencoder(tmp_path / "other", seed=1))
    with pytest.raises(DataError, match=r"latents of .* are of another autoencoder .* than those the run was trained"):
        probed("three.json", other)
