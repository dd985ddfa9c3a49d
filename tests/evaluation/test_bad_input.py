"""What the commands about numbers refuse: one sentence, exit code 2, before any work, and no file harmed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vrpo.checkpoints import Checkpoint
from vrpo.cli import main
from vrpo.config_load import to_yaml, validate
from vrpo.evaluation.frechet import FeatureStatistics
from vrpo.models.transformer import build_transformer
from vrpo.training.checkpoint import save_checkpoint

JUDGE = ["--features", "resnet10t", "--features-weights", "random"]


def refused(words: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one sentence by which a command is refused."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    told = capsys.readouterr()
    assert stop.value.code == 2, told
    assert told.err.startswith("vrpo: ")
    assert len(told.err.splitlines()) == 1, told.err
    assert told.out == ""
    return told.err.removeprefix("vrpo: ").strip()


def write_npz(path: Path, count: int = 6, side: int = 8) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    np.savez(path, arr_0=images)
    return path


def write_run(folder: Path, num_classes: int) -> Path:
    folder.mkdir()
    config = {"model": {"name": "SiT-N/4"}, "data": {"conditional": num_classes > 0}, "sample": {"steps": 1}}
    (folder / "config.yaml").write_text(to_yaml(validate(config, "the test")))
    trunk = build_transformer("SiT-N/4", input_size=8, in_channels=3, num_classes=num_classes)
    tensors = {"model": trunk.state_dict(), "ema": trunk.state_dict(), "objective": {}, "optimizer": {}}
    state = {"step": 8, "images": 64, "network": trunk.config, "class_names": ["cat", "dog"][:num_classes]}
    save_checkpoint(folder, Checkpoint(tensors, state), keep=1)
    return folder


def write_folder(folder: Path, *sides: int) -> Path:
    folder.mkdir()
    for index, side in enumerate(sides):
        Image.new("RGB", (side, side), (index, 0, 0)).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize(
    "words",
    [
        "evaluate samples.npz --reference reference.npz --out samples.npz",
        "evaluate samples.npz --reference reference.npz --out ./folder/../reference.npz",
        "evaluate samples.npz --reference reference.npz --out link.json",
        "evaluate folder samples.npz --reference reference.npz --out folder/sampling.json",
        "evaluate stats reference.npz --out reference.npz",
        "evaluate stats reference.npz --out folder/../reference.npz",
        "evaluate parity samples.npz reference.npz --out samples.npz",
        "evaluate parity samples.npz reference.npz --out reference.npz",
    ],
)
def test_no_result_replaces_what_it_was_made_of(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vrpo.vision.encoders.load_feature_network", lambda *_, **__: pytest.fail("work began"))
    write_npz(tmp_path / "samples.npz")
    write_npz(tmp_path / "reference.npz")
    (write_folder(tmp_path / "folder", 8) / "sampling.json").write_text("{}")
    (tmp_path / "link.json").symlink_to("samples.npz")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    assert "would replace" in refused([*words.split(), *JUDGE], capsys)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("words", ["evaluate a.npz --reference r.npz", "evaluate parity a.npz r.npz"])
def test_a_result_in_json_is_called_so(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_npz(tmp_path / "a.npz")
    write_npz(tmp_path / "r.npz")
    told = refused([*words.split(), *JUDGE, "--out", "scores.npz"], capsys)
    assert told == "--out scores.npz is no .json file: give the name of one, such as scores.json."


@pytest.mark.parametrize(
    "command", ["evaluate", "evaluate stats", "evaluate parity", "evaluate cknna", "evaluate probe"]
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_several_processes_are_refused_by_the_first_alone(
    command: str, rank: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "nothing"])
    told = capsys.readouterr().err
    assert stop.value.code == 2
    if rank == "1":
        assert told == ""
    elif command == "evaluate":
        assert told == (
            "vrpo: vrpo evaluate is the work of one process, and 2 were started: draw with `torchrun ... -m vrpo "
            "sample RUN --out samples.npz`, then score with `vrpo evaluate samples.npz` without torchrun.\n"
        )
    else:
        assert (
            told == f"vrpo: vrpo {command} is the work of one process, and 2 were started: run it without torchrun.\n"
        )


def spoil_one(pixels: torch.Tensor) -> torch.Tensor:
    """Return features of which those of one image are not numbers."""
    features = pixels.float().mean((2, 3))
    features[0, 0] = torch.nan
    return features


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "evaluate few.npz --reference many.npz",
            "There are 3 samples in few.npz and fd and kid and precision and recall need",
        ),
        ("evaluate one.npz --reference many.npz --metrics fd", "There is 1 sample in one.npz and fd needs at least 2;"),
        ("evaluate many.npz --reference few.npz", "The reference few.npz holds 3 images, too few for fd, kid,"),
        ("evaluate few.npz --reference many.npz --samples 4", "There are 3 images in few.npz and 4 were asked for;"),
        ("evaluate mixed --reference many.npz", "'mixed' mixes image sizes: '1.png' has 9x9 pixels where the first"),
        (
            "evaluate no-images.npz --reference many.npz",
            "no-images.npz holds no images (no array 'arr_0'); give an .npz",
        ),
        (
            "evaluate floats.npz --reference many.npz",
            "'arr_0' of floats.npz is float64 of shape (4, 8, 8, 3); give uint8",
        ),
        ("evaluate many.npz --reference moments.npz --features inception", "wrong.pth is not the Inception network of"),
        (
            "evaluate stats one.npz --out s.npz",
            "A covariance needs at least 2 images, and 1 was given; give more images.",
        ),
        ("evaluate parity few.npz many.npz", "There are 3 samples in few.npz and"),
    ],
)
def test_images_that_cannot_be_scored(
    words: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, count in (("one", 1), ("few", 3), ("many", 6)):
        write_npz(tmp_path / f"{name}.npz", count)
    write_folder(tmp_path / "mixed", 8, 9, 8, 8)
    np.savez(tmp_path / "no-images.npz", labels=np.arange(3))
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((4, 8, 8, 3)))
    np.savez(tmp_path / "moments.npz", mu=np.zeros(3), sigma=np.eye(3))
    (tmp_path / "wrong.pth").write_bytes(b"no weights at all")
    judge = ["--features-weights", "wrong.pth"] if "inception" in words else JUDGE
    assert sentence in refused([*words.split(), *judge], capsys)
    assert not (tmp_path / "s.npz").exists()


def test_features_that_are_not_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = SimpleNamespace(name="broken", weights_hash="0", input_size=8, pooled=spoil_one)
    monkeypatch.setattr("vrpo.vision.encoders.load_feature_network", lambda *_, **__: judge)
    path = write_npz(tmp_path / "many.npz")
    told = refused(["evaluate", path, "--reference", path, *JUDGE], capsys)
    assert told == "broken returned NaN or infinite features for images 0 to 5 of many.npz; check its weights file."


@pytest.mark.parametrize(
    ("flaw", "sentence"),
    [
        ("nan", "'mu' or 'sigma' of {file} contains NaN or infinite values; make the file again, or give the images."),
        ("asymmetric", "'sigma' of {file} is no covariance, for it is not symmetric; make the file again, or give"),
        ("negative", "'sigma' of {file} is no covariance, for it has negative eigenvalues; make the file again, or"),
    ],
)
def test_statistics_that_are_none(flaw: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, file = write_npz(tmp_path / "many.npz"), tmp_path / "stats.npz"
    main_words = ["evaluate", "stats", images, "--out", file, *JUDGE]
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in main_words])
    assert stop.value.code == 0
    capsys.readouterr()
    with np.load(file) as archive:
        arrays = dict(archive)
    if flaw == "nan":
        arrays["sigma"][1, 1] = np.nan
    elif flaw == "asymmetric":
        arrays["sigma"][0, 1] += 0.1 * arrays["sigma"].max()
    else:
        arrays["sigma"] -= 0.1 * np.trace(arrays["sigma"]) * np.eye(len(arrays["sigma"]))
    np.savez(file, **arrays)
    told = refused(["evaluate", images, "--reference", file, *JUDGE, "--metrics", "fd"], capsys)
    assert sentence.format(file=file) in told


def test_a_class_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {count: write_run(tmp_path / f"run-{count}", num_classes=count) for count in (0, 2)}
    words = ["--out", tmp_path / "drawn", "--device", "cpu", "--class"]
    assert refused(["sample", runs[2], *words, "catt"], capsys) == "there is no class 'catt': did you mean 'cat'?"
    assert refused(["sample", runs[2], *words, "2"], capsys) == (
        "there is no class '2': choose one of: cat, dog, or a number from 0 to 1."
    )
    assert "because the model has no classes: leave it out." in refused(["sample", runs[0], *words, "cat"], capsys)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_moments_of_few_images_are_a_covariance_however_they_are_rounded(tmp_path: Path, dtype: type) -> None:
    """With fewer images than features many eigenvalues are zero, and rounding makes some of them negative."""
    features = np.random.default_rng(0).normal(5, 3, (20, 200))
    sigma = np.cov(features, rowvar=False).astype(dtype)
    assert np.linalg.eigvalsh(sigma.astype(np.float64))[0] < 0
    np.savez(tmp_path / "few.npz", mu=features.mean(0), sigma=sigma)
    assert FeatureStatistics.load(tmp_path / "few.npz").width == 200
