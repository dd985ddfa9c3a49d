"""``vrpo evaluate`` of several sources: refused together, scored one by one, each kept when it is done."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vrpo.checkpoints import Checkpoint
from vrpo.commands.evaluation import evaluate, parity
from vrpo.commands.images import sample
from vrpo.config_load import to_yaml, validate
from vrpo.errors import CheckpointError, EvaluationError
from vrpo.models.transformer import build_transformer
from vrpo.sampling import RunSampler
from vrpo.training.checkpoint import save_checkpoint

JUDGE = ["--features", "resnet10t", "--features-weights", "random", "--metrics", "fd", "--samples", "4"]


def write_run(folder: Path) -> Path:
    folder.mkdir()
    config = {"model": {"name": "SiT-N/4"}, "data": {"conditional": False}, "sample": {"steps": 1}}
    (folder / "config.yaml").write_text(to_yaml(validate(config, "the test")))
    trunk = build_transformer("SiT-N/4", input_size=8, in_channels=3, num_classes=0)
    tensors = {"model": trunk.state_dict(), "ema": trunk.state_dict(), "objective": {}, "optimizer": {}}
    state = {"step": 8, "images": 64, "network": trunk.config, "class_names": []}
    save_checkpoint(folder, Checkpoint(tensors, state), keep=1)
    return folder


def write_images(folder: Path) -> Path:
    folder.mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)):
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The runs that are loaded, each with how many networks of others are still in memory."""
    told: list[tuple[str, int]] = []
    networks: list[weakref.ref[torch.nn.Module]] = []
    begin = RunSampler.__init__

    def load(self: RunSampler, run: Path, *arguments: Any, **options: Any) -> None:
        told.append((run.name, sum(network() is not None for network in networks)))
        begin(self, run, *arguments, **options)
        networks.append(weakref.ref(self.loaded.network))

    monkeypatch.setattr(RunSampler, "__init__", load)
    return told


def test_memory_holds_one_run_at_a_time(tmp_path: Path, loads: list[tuple[str, int]]) -> None:
    runs = [write_run(tmp_path / name) for name in ("one", "two", "three")]
    reference, out = write_images(tmp_path / "images"), tmp_path / "all.json"
    words = ["--reference", str(reference), *JUDGE, "--out", str(out)]

    assert evaluate([*map(str, runs), *words]) == 0

    assert [source for source, _ in loads] == ["one", "two", "three"] * 2
    assert [others for _, others in loads] == [0] * 6
    assert [Path(record["source"]) for record in json.loads(out.read_text())["evaluations"]] == runs
    loads.clear()
    assert evaluate([str(runs[0]), *words]) == 0
    assert loads == [("one", 0)], "a run alone is loaded once"
    assert json.loads(out.read_text())["step"] == 8


def test_a_run_that_cannot_be_loaded_stops_the_others_before_they_are_drawn(
    tmp_path: Path, loads: list[tuple[str, int]]
) -> None:
    runs = [write_run(tmp_path / name) for name in ("one", "two")]
    (weights,) = runs[1].glob("checkpoints/*/ema.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    reference = write_images(tmp_path / "images")

    with pytest.raises(CheckpointError, match="does not match its hash"):
        evaluate([*map(str, runs), "--reference", str(reference), *JUDGE])

    assert [source for source, _ in loads] == ["one", "two"]
    assert not list((runs[0] / "evaluations").iterdir())


def test_what_is_scored_is_kept_when_a_later_source_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, damaged, out = write_images(tmp_path / "whole"), write_images(tmp_path / "damaged"), tmp_path / "all.json"
    (damaged / "2.png").write_bytes((damaged / "2.png").read_bytes()[:60])

    with pytest.raises(EvaluationError, match=r"Image '2\.png' cannot be decoded"):
        evaluate([str(whole), str(damaged), "--reference", str(whole), *JUDGE, "--out", str(out)])

    (record,) = json.loads(out.read_text())["evaluations"]
    assert (record["source"], list(record["metrics"])) == (str(whole), ["fd"])
    assert "Protocol" in capsys.readouterr().out


class Rounding:
    """A judge whose features depend on how many images it sees at once, as rounding does."""

    name, weights_hash, input_size = "rounding", "0" * 64, 8

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3)) + 0.01 * len(images)


def test_a_run_and_the_file_of_its_images_score_the_same_to_the_last_digit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More images than the judge sees at once, and a sampler that draws other batches of them."""
    monkeypatch.setattr("vrpo.vision.encoders.load_feature_network", lambda *_, **__: Rounding())
    run, images, out = write_run(tmp_path / "run"), write_images(tmp_path / "images"), tmp_path / "one.json"
    count = ["--compute-batch", "12", "--device", "cpu"]
    assert sample([str(run), "--out", str(tmp_path / "drawn.npz"), "--count", "70", *count]) == 0

    results = []
    for source in (run, tmp_path / "drawn.npz"):
        judge = [*JUDGE[:-2], "--samples", "70", *count]
        assert evaluate([str(source), "--reference", str(images), *judge, "--out", str(out)]) == 0
        results.append(json.loads(out.read_text()))

    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["protocol"] == results[1]["protocol"]


def test_parity_states_how_its_samples_were_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, images = write_run(tmp_path / "run"), write_images(tmp_path / "images")
    assert sample([str(run), "--out", str(tmp_path / "drawn.npz"), "--count", "4", "--device", "cpu"]) == 0
    words = [str(tmp_path / "drawn.npz"), str(images), *JUDGE[:4], "--features-size", "32", "--expect", "fd=1"]

    assert parity([*words, "--out", str(tmp_path / "one.json")]) == 1

    protocol = json.loads((tmp_path / "one.json").read_text())["protocol"]
    assert (protocol["sampler"], protocol["steps"], protocol["seed"]) == ("ode-euler", 1, 0)
    assert protocol["features"]["input_size"] == 32
    assert "sampler not recorded" not in capsys.readouterr().out
