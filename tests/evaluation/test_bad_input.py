"""What the commands about numbers refuse: one sentence, exit code 2, before any work, and no file harmed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vrpo.cli import main

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
