"""Every other file that a command writes, refused by the system: a sentence, nothing half-written, nothing lost.

Training and preparing, whose writes come one after another, are in `test_full_disk.py`.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_run import tiny_config

from vrpo.cli import main
from vrpo.config_load import to_yaml
from vrpo.data.shards import verify_dataset
from vrpo.models.transformer import build_transformer
from vrpo.models.weights import save_published

JUDGE = ["--features", "resnet10t", "--features-weights", "random", "--features-size", "32", "--metrics", "fd"]
DRAWING = ["--steps", "2", "--device", "cpu"]
LOOKING = ["--depths", "1", "--times", "0.5", "--images", "12", "--device", "cpu"]
REFUSALS = ("no space", "file too large")


@dataclass(frozen=True)
class Writing:
    """A command, the file that it writes (or a folder), and the size of its smallest file that is refused, bytes."""

    words: tuple[str, ...]
    out: str
    limit: int = 256
    repeats: bool = True


WRITINGS = {
    "images-npz": Writing(("sample", "{run}", "--out", "{out}", "--count", "9", *DRAWING), "i.npz"),
    "images-folder": Writing(("sample", "{run}", "--out", "{out}", "--count", "9", *DRAWING), "images"),
    "images-grid": Writing(("sample", "{run}", "--out", "{out}", "--count", "9", *DRAWING), "i.png"),
    "evaluation": Writing(
        ("evaluate", "{run}", "--reference", "{data}", "--out", "{out}", "--samples", "24", *JUDGE, *DRAWING), "e.json"
    ),
    "evaluation-of-the-run": Writing(
        ("evaluate", "{run}", "--reference", "{data}", "--samples", "24", *JUDGE, *DRAWING), "run/evaluations"
    ),
    "statistics": Writing(("evaluate", "stats", "{data}", "--out", "{out}", *JUDGE[:6], "--device", "cpu"), "s.npz"),
    "cknna": Writing(("evaluate", "cknna", "{run}", "--out", "{out}", *LOOKING), "c.json"),
    "probe": Writing(("evaluate", "probe", "{run}", "--out", "{out}", "--test", "{data}", *LOOKING), "p.json"),
    # How far an encoder is trained in a given time is no constant.
    "encoder": Writing(
        ("encoder", "fit", "{data}", "--out", "{out}", "--minutes", "0.01", "--width", "8", "--device", "cpu"),
        "encoder.safetensors",
        repeats=False,
    ),
    "browse": Writing(("data", "browse", "{data}", "--html", "{out}"), "page.html"),
    "report": Writing(("compare", "{run}", "--out", "{out}", "--json"), "report.html"),
}
every_writing = pytest.mark.parametrize("writing", WRITINGS.values(), ids=WRITINGS.keys())


def run(writing: Writing, folder: Path) -> int:
    names = {"run": folder / "run", "data": folder / "data", "out": folder / writing.out}
    with pytest.raises(SystemExit) as stop:
        main([word.format(**names) for word in writing.words])
    return int(stop.value.code or 0)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def left_behind(folder: Path) -> list[str]:
    return [str(file) for file in folder.rglob("*") if file.name.startswith(".") and file.name.endswith(".tmp")]


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Path:
    """A folder with a run and its data that a test may write into."""
    shutil.copytree(finished / "data", tmp_path / "data")
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
@every_writing
def test_each_write_of_a_command(
    writing: Writing,
    place: Path,
    tmp_path_factory: pytest.TempPathFactory,
    refuse: Callable[[int], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, before = tmp_path_factory.mktemp("whole") / "place", content(place)
    shutil.copytree(place, whole)
    seen = refuse(0)
    assert run(writing, whole) == 0
    monkeypatch.undo()
    numbers: dict[str, int] = {}
    for number, path in enumerate(seen, start=1):
        numbers.setdefault(Path(path).suffix + Path(path).name[:5], number)
    assert numbers
    for number in numbers.values():
        folder = tmp_path_factory.mktemp("refused") / "place"
        shutil.copytree(place, folder)
        refuse(number)
        code = run(writing, folder)
        monkeypatch.undo()
        told = capsys.readouterr().err.strip().splitlines()
        # Features of a reference are kept where there is room; without, the command has its result all the same.
        assert code == (0 if "/features" in seen[number - 1] else 2), (seen[number - 1], told)
        assert code == 0 or "no space" in told[-1].lower(), told
        assert "Traceback" not in "".join(told)
        assert not left_behind(folder)
        now = content(folder)
        assert {name: now.get(name) for name in before} == before, "an earlier file was lost"
        assert run(writing, folder) == 0
        assert content(folder).keys() == content(whole).keys()
        if writing.repeats:
            assert (folder / writing.out).is_dir() or named(folder / writing.out) == named(whole / writing.out)


def named(file: Path) -> bytes:
    """Return what a file holds, without the folder's name in it."""
    return file.read_bytes().replace(str(file.parent).encode(), b"").replace(str(file.parent.parent).encode(), b"")


@pytest.fixture
def limited() -> Iterator[Callable[[int], None]]:
    """Return a function that lets the system refuse what a file has beyond some bytes, as a full disk or a quota."""
    if not hasattr(resource, "RLIMIT_FSIZE"):
        pytest.skip("this system bounds no file's size")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@every_writing
def test_a_real_limit_keeps_the_earlier_file(
    writing: Writing, place: Path, limited: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    out = place / writing.out
    if out.suffix:
        out.write_text("an earlier file")
    limited(writing.limit)
    code = run(writing, place)
    told = capsys.readouterr().err.strip().splitlines()
    limited(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert code == 2, told
    assert any(word in told[-1].lower() for word in REFUSALS), told
    assert "Traceback" not in "".join(told)
    assert not left_behind(place)
    if out.suffix:
        assert out.read_text() == "an earlier file"
    assert run(writing, place) == 0


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_exported_weights_are_whole_or_not_there(suffix: str, limited: Callable[[int], None], tmp_path: Path) -> None:
    network = build_transformer("SiT-N/4", input_size=16, in_channels=3, num_classes=3)
    file = tmp_path / f"weights{suffix}"
    file.write_text("an earlier file")
    limited(4096)
    with pytest.raises(OSError, match="File too large"):
        save_published(network, file, "sit")
    limited(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert file.read_text() == "an earlier file"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Return a function that gives a file system in memory of so many KiB, or its size to the one that is there."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def give(kib: int) -> Path:
        how = f"size={kib}k" if not disk.is_mount() else f"remount,size={kib}k"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", how, "none", disk], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("this user may mount no file system")
        return disk

    yield give
    if disk.is_mount():
        subprocess.run(["umount", disk], check=True)


def pictures(folder: Path) -> Path:
    """Write 300 pictures of 64 pixels a side in two classes."""
    values = np.random.default_rng(0).integers(0, 256, (300, 64, 64, 3), dtype=np.uint8)
    for index, pixels in enumerate(values):
        file = folder / ("cat", "dog")[index % 2] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return folder


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
@pytest.mark.parametrize("what", ["train", "prepare", "sample"])
def test_a_disk_that_is_full_at_any_size(
    what: str,
    finished: Path,
    small_disk: Callable[[int], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    """A real file system of every size from too small to enough: the disk grows, and the same command goes on."""
    (tmp_path / "config.yaml").write_text(to_yaml(tiny_config(finished / "data", sample_every=16)))
    words = {
        "train": ["train", "--config", str(tmp_path / "config.yaml"), "--resume", "--out"],
        "prepare": [
            "prepare",
            "--size",
            "64",
            "--workers",
            "1",
            "--shard-mb",
            "1",
            str(pictures(tmp_path / "pictures")),
        ],
        "sample": ["sample", str(finished / "run"), "--count", "96", "--batch-size", "8", *DRAWING, "--out"],
    }[what]

    def attempt(out: Path) -> int:
        with pytest.raises(SystemExit) as stop:
            main([*words, str(out)])
        return int(stop.value.code or 0)

    assert attempt(tmp_path / "whole" / "out") == 0
    capsys.readouterr()
    refused = 0
    for kib in range(8, 100_000, {"train": 600, "prepare": 300, "sample": 16}[what]):
        disk = small_disk(kib)
        code = attempt(disk / "out")
        told = capsys.readouterr().err.strip().splitlines()
        assert "Traceback" not in "".join(told)
        if code == 0:
            break
        refused += 1
        assert code == 2
        assert any(word in told[-1].lower() for word in ("no space", "is full")), told
        assert not left_behind(disk)
    record_property("refusals", refused)
    assert refused >= 3
    ours, theirs = content(disk / "out"), content(tmp_path / "whole" / "out")
    assert {name for name in ours if "damaged" not in name} == theirs.keys()
    if what == "prepare":
        verify_dataset(disk / "out")
    for name, whole in theirs.items():
        if name.endswith((".safetensors", ".png", "manifest.json")):
            assert ours[name] == whole, name
