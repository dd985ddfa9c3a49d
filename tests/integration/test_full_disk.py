"""A disk that refuses any one write: a sentence, nothing half-written under a final name, and what was there stays."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_run import tiny_config, tiny_data

from vrpo.cli import main
from vrpo.config_load import to_yaml
from vrpo.data.shards import verify_dataset
from vrpo.training.checkpoint import find_newest
from vrpo.training.trainer import train


def run(words: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        main(words)
    return int(stop.value.code or 0)


@pytest.fixture
def config(finished: Path, tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(tiny_config(finished / "data", sample_every=16)))
    return file


linux = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")


@linux
def test_each_write_of_a_training_run(
    config: Path,
    tmp_path: Path,
    refuse: Callable[[int], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = refuse(0)
    assert run(["train", "--config", str(config), "--out", str(tmp_path / "whole")]) == 0
    kinds: dict[str, int] = {}
    for number, path in enumerate(seen, start=1):
        kinds.setdefault(kind(Path(path)), number)
    assert {"config.yaml", "run.json", "state.json", "model.safetensors", "checkpoints"} <= set(kinds)
    monkeypatch.undo()
    for what, number in kinds.items():
        refuse(number)
        folder = tmp_path / f"refused-{number}"
        assert run(["train", "--config", str(config), "--out", str(folder)]) == 2, what
        monkeypatch.undo()
        told = capsys.readouterr().err.strip().splitlines()
        assert "no space" in told[-1].lower(), (what, told)
        assert "Traceback" not in "".join(told)
        if (folder / "checkpoints").is_dir() and any((folder / "checkpoints").glob("step-*")):
            found = find_newest(folder)
            assert found is not None
            assert found[1] == [], "a checkpoint under its final name is not whole"
        assert run(["train", "--config", str(config), "--out", str(folder), "--resume"]) == 0, what
        assert final(folder) == final(tmp_path / "whole"), what


def kind(path: Path) -> str:
    """Return what a file that is being written will be."""
    return path.name.strip(".").split(".yaml")[0] + ".yaml" if ".yaml" in path.name else _stem(path.name)


def _stem(name: str) -> str:
    for known in ("run.json", "state.json", "metrics.jsonl", "target_means.safetensors", "latest"):
        if known in name:
            return known
    return "step" if "step-" in name else name


def final(folder: Path) -> bytes:
    return (max((folder / "checkpoints").glob("step-*")) / "model.safetensors").read_bytes()


@linux
def test_each_write_of_a_preparation(
    tmp_path: Path, refuse: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vrpo.errors import DataError

    seen = refuse(0)
    tiny_data(tmp_path / "whole")
    writes = len(seen)
    monkeypatch.undo()
    assert writes >= 9
    for number in range(1, writes + 1):
        refuse(number)
        with pytest.raises(DataError, match=r"is full.*finished shards are kept"):
            tiny_data(tmp_path / f"refused-{number}")
        monkeypatch.undo()
        tiny_data(tmp_path / f"refused-{number}")
        verify_dataset(tmp_path / f"refused-{number}")
        assert (tmp_path / f"refused-{number}" / "manifest.json").read_bytes() == (
            tmp_path / "whole" / "manifest.json"
        ).read_bytes()


@pytest.fixture
def small_files() -> Iterator[None]:
    """Let the system refuse every file of more than 4 KiB, as a full disk or a quota would."""
    if not hasattr(resource, "RLIMIT_FSIZE"):
        pytest.skip("this system bounds no file's size")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize(
    ("words", "out"),
    [
        (["train", "--config", "{config}", "--out", "{out}"], "refused"),
        (["sample", "{run}", "--out", "{out}", "--count", "64", "--device", "cpu"], "samples.npz"),
        (["sample", "{run}", "--out", "{out}", "--count", "64", "--device", "cpu"], "samples.png"),
        (["compare", "{run}", "--out", "{out}"], "report.html"),
    ],
    ids=["checkpoint", "npz", "grid", "report"],
)
def test_a_real_limit_of_the_system(
    words: list[str], out: str, finished: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / out
    if target.suffix:
        target.write_text("an earlier file")
    names = {"config": config, "run": finished / "run", "out": target}
    assert run([word.format(**names) for word in words]) == 2
    assert "file too large" in capsys.readouterr().err.strip().splitlines()[-1].lower()
    if target.is_dir():
        assert not list(target.rglob("step-*"))
    else:
        assert target.read_text() == "an earlier file"


def test_a_folder_that_cannot_be_written_keeps_the_last_checkpoint(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file system that was remounted read-only answers; permissions would not stop a privileged user."""
    from vrpo.errors import CheckpointError

    shutil.copytree(finished / "run", tmp_path / "run")
    before = final(tmp_path / "run")
    mkdir = Path.mkdir

    def refused(self: Path, *arguments: object, **options: object) -> None:
        if "checkpoints" in self.parts:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        mkdir(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", refused)
    longer = tiny_config(finished / "data", sample_every=16, images=64)
    with pytest.raises(CheckpointError, match=r"Read-only file system\): earlier checkpoints are kept"):
        train(longer, tmp_path / "run", resume=True, say=lambda sentence: None)
    assert final(tmp_path / "run") == before
