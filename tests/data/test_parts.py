"""Archives and tables that are parts of one set: no other set is mixed in, and none of its parts is missing."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import pytest
from source_files import make, table, write_table, write_tar

from vrpo.cli import main
from vrpo.data.sources import open_source
from vrpo.errors import DataError


def write_shards(folder: Path, names: list[str], image: bytes, *, label: bytes | None) -> Path:
    """Write one archive a name: an image in it, with its class beside it, or in a class folder."""
    folder.mkdir()
    for number, name in enumerate(names):
        key = f"{number:03d}" if label is not None else f"{'cat' if number % 2 else 'dog'}/{number:03d}"
        members = {f"{key}.png": image} | ({f"{key}.cls": label} if label is not None else {})
        if label is None:
            members["ant/0.png"] = image
        write_tar(folder / f"{name}.tar", members)
    return folder


@pytest.mark.parametrize("label", [b"1", None])
@pytest.mark.parametrize(
    "names",
    [
        ["imagenet1k-train-0000", "imagenet1k-train-0001", "imagenet1k-validation-00"],
        ["train-00000-of-00001", "test-00000-of-00001"],
        ["train", "val"],
    ],
)
def test_archives_of_several_sets_are_refused(
    files: list[bytes], tmp_path: Path, names: list[str], label: bytes | None
) -> None:
    folder = write_shards(tmp_path / "shards", names, files[0], label=label)
    with pytest.raises(DataError, match=r"'.*shards' holds several sets \(.*, .*\): give each a folder of its own"):
        open_source(folder)


def test_flat_archives_of_several_splits_are_no_classes(files: list[bytes], tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("train-0", "train-1", "val-0"):
        write_tar(folder / f"{name}.tar", {"1.png": files[0]})
    with pytest.raises(DataError, match=r"holds several sets \(train, val\)"):
        open_source(folder)


@pytest.mark.parametrize("label", [b"1", None])
@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["set-000", "set-001", "set-003"], "number 2 of its parts is missing"),
        (["00000", "00007"], "number 1 of its parts is missing, and 5 more"),
        (["train-00000-of-00003", "train-00002-of-00003"], "number 1 of its 3 parts is missing"),
        (["train-1-of-3", "train-3-of-3"], "number 2 of its 3 parts is missing"),
        (["train-00000-of-00003"], "number 1 of its 3 parts is missing, and 1 more"),
        (["train-0-of-1", "train-0-of-2", "train-1-of-2"], "parts of 1 and of 2"),
    ],
)
def test_a_missing_archive_is_named(
    files: list[bytes], tmp_path: Path, names: list[str], label: bytes | None, words: str
) -> None:
    folder = write_shards(tmp_path / "shards", names, files[0], label=label)
    with pytest.raises(DataError, match=words):
        open_source(folder)


def test_a_missing_archive_of_flat_images_makes_no_classes(files: list[bytes], tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in (0, 2):
        write_tar(folder / f"train-{number}.tar", {"1.png": files[0]})
    with pytest.raises(DataError, match="number 1 of its parts is missing"):
        open_source(folder)


def test_some_shards_in_a_row_are_a_set(files: list[bytes], tmp_path: Path) -> None:
    folder = write_shards(
        tmp_path / "shards", ["v1.5-set-0098", "v1.5-set-0099", "v1.5-set-0100"], files[0], label=b"0"
    )
    assert len(open_source(folder).entries) == 3


def test_images_beside_archives_are_refused_and_other_files_counted(files: list[bytes], tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", ["set-0", "set-1"], files[0], label=b"0")
    (folder / "index.json").write_text("{}")
    assert open_source(folder).ignored == 1
    (folder / "cat").mkdir()
    (folder / "cat" / "1.png").write_bytes(files[0])
    with pytest.raises(DataError, match=re.escape("has images beside its tar archives (such as 'cat/1.png')")):
        open_source(folder)


@pytest.mark.parametrize("name", ["set.tar.gz", "set.tgz", "set.tar.zst"])
def test_a_compressed_archive_is_to_be_unpacked(
    files: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / name
    with tarfile.open(file, "w:gz") as archive:
        archive.add(write_tar(tmp_path / "set.tar", {"1.png": files[0]}), "set.tar")
    for source in (file, tmp_path / "in"):
        with pytest.raises(SystemExit) as stop:
            main(["prepare", str(source), str(tmp_path / "out"), "--size", "16"])
        assert stop.value.code == 2
        assert "unpack" in capsys.readouterr().err


def test_missing_parquet_parts_are_named(files: list[bytes], tmp_path: Path) -> None:
    folder = tmp_path / "set"
    first = write_table(folder / "train-00000-of-00002.parquet", table(files, 0, 3))
    with pytest.raises(DataError, match="number 1 of its 2 parts is missing"):
        open_source(folder)
    assert len(make(first, tmp_path / "one")) == 3  # a file that is named is taken alone
    write_table(folder / "train-00001-of-00002.parquet", table(files, 3, 6))
    assert len(open_source(folder).entries) == 6
    for number in (0, 1, 3):
        write_table(tmp_path / "rows" / f"train-{number}.parquet", table(files, 0, 3))
    with pytest.raises(DataError, match="number 2 of its parts is missing"):
        open_source(tmp_path / "rows")
