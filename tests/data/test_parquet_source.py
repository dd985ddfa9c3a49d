"""Parquet in the hub's layout: rows, splits, bounded memory, damage."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from source_files import COUNT, assert_rows, make, table, write_table

from vrpo.data.shards import ShardedDataset
from vrpo.data.sources import open_source
from vrpo.data.transforms import decode
from vrpo.errors import ConfigError, DataError

CLASSES = ("cat", "dog", "eel")


@pytest.mark.parametrize("workers", [1, 2])
def test_parquet_of_the_hub(files: list[bytes], tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "set" / "data"
    folder.parent.mkdir()
    write_table(folder / "train-00000-of-00002.parquet", table(files, 0, 7))
    write_table(folder / "train-00001-of-00002.parquet", table(files, 7, COUNT))
    dataset = make(folder.parent, tmp_path / "out", workers=workers)
    assert_rows(dataset, files, list(range(COUNT)), [i % 3 for i in range(COUNT)])
    assert dataset.class_names == ("cat", "dog", "eel")
    assert dataset.key(8) == "train-00001-of-00002.parquet/00000001"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a hub that is away: what it holds of the set owner/name has been fetched before."""
    import huggingface_hub

    root = tmp_path / "snapshots" / "0123"
    root.mkdir(parents=True)

    def download(name: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        assert (name, repo_type) == ("owner/name", "dataset")
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        return str(root)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr("vrpo.vision.hub._reachable", lambda endpoint: False)
    return root


def test_a_split_of_the_hub_is_told_from_others_in_one_snapshot(files: list[bytes], hub: Path, tmp_path: Path) -> None:
    write_table(hub / "data" / "train-00000-of-00002.parquet", table(files, 0, 4))
    write_table(hub / "data" / "train-00001-of-00002.parquet", table(files, 4, 8))
    write_table(hub / "data" / "test-00000-of-00001-0a1b2c.parquet", table(files, 8, 11))
    write_table(hub / "data" / "mytest-00000-of-00001.parquet", table(files, 11, COUNT))
    for name, split, rows in (("hf:owner/name", "train", range(8)), ("hf:owner/name/test", "test", range(8, 11))):
        dataset = make(name, tmp_path / split)
        assert len(dataset) == len(rows)
        assert_rows(dataset, files[rows.start :], list(range(len(rows))), [i % 3 for i in rows])
        assert dataset.manifest.source.name == f"owner/name/{split}"


def test_a_split_of_the_hub_that_is_ambiguous_or_incomplete_is_refused(files: list[bytes], hub: Path) -> None:
    for name in ("hf:owner/name/*", "hf:owner/name/../x", "hf:owner"):
        with pytest.raises(ConfigError, match="hf:OWNER/NAME"):
            open_source(name)
    write_table(hub / "small" / "train-00000-of-00002.parquet", table(files, 0, 4))
    with pytest.raises(DataError, match="no parquet files of a split 'test'"):
        open_source("hf:owner/name/test")
    with pytest.raises(DataError, match="1 files of 2 are here"):
        open_source("hf:owner/name")
    write_table(hub / "large" / "train-00000-of-00001.parquet", table(files, 4, 8))
    with pytest.raises(DataError, match=r"'train' in several folders \(large, small\)"):
        open_source("hf:owner/name")


def test_parquet_that_cannot_be_used_is_one_sentence(files: list[bytes], tmp_path: Path, monkeypatch) -> None:
    only = write_table(tmp_path / "only.parquet", table(files, 0, 3, image=None))
    with pytest.raises(DataError, match=r"has no image column, .*: its columns are label\.$"):
        open_source(only)
    plain = write_table(tmp_path / "plain.parquet", table(files, 0, 3, imag=["a", "b", "c"], image=None))
    with pytest.raises(DataError, match=r"has no image column, .*; did you mean 'imag'"):
        open_source(plain)
    with pytest.raises(DataError, match="label 7, which is no class number"):
        open_source(write_table(tmp_path / "label.parquet", table(files, 0, 3, label=[0, 7, 1])))
    cut = write_table(tmp_path / "cut.parquet", table(files, 0, 3))
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(DataError, match="damaged or incomplete parquet file"):
        open_source(cut)
    for split in ("train", "test"):
        write_table(tmp_path / "splits" / f"{split}-00000-of-00001.parquet", table(files, 0, 3))
    with pytest.raises(DataError, match=r"several splits \(test, train\)"):
        open_source(tmp_path / "splits")
    claim = table(files, 0, 0, image=[{"bytes": None, "path": None}] * 10_000, label=[0] * 10_000)
    with pytest.raises(DataError, match="claims 10,000 rows, which it cannot hold"):
        open_source(write_table(tmp_path / "claim.parquet", claim, 10_000))
    with pytest.raises(ConfigError, match="hf:OWNER/NAME"):
        open_source("hf:nonsense")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'vrpo\[parquet\]'"):
        open_source(plain)


def test_names_in_the_label_column_are_classes(files: list[bytes], tmp_path: Path) -> None:
    folder = tmp_path / "set"
    names = ["eel", "dog", "eel", "\u00e9l\u00e9phant"]
    write_table(folder / "train-0.parquet", table(files, 0, 4, features=False, label=names))
    encoded = pytest.importorskip("pyarrow").array(["cat", "eel"]).dictionary_encode()
    write_table(folder / "train-1.parquet", table(files, 4, 6, features=False, label=encoded))
    source = open_source(folder)
    assert source.class_names == ("cat", "dog", "eel", "\u00e9l\u00e9phant")
    assert [entry.label for entry in source.entries] == [2, 1, 2, 3, 0, 2]
    with pytest.raises(DataError, match=r"row 'none.parquet/00000001' of .* has no label, as others have"):
        open_source(write_table(tmp_path / "none.parquet", table(files, 0, 3, features=False, label=["a", None, "b"])))


def test_a_name_that_all_rows_share_is_held_once(files: list[bytes], tmp_path: Path) -> None:
    """A terabyte, were it held for every row."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows, name = 20_000, "x" * (50 << 20)
    images = pa.StructArray.from_arrays([pa.array([f"{i:020d}".encode() for i in range(rows)])], ["bytes"])
    label = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([name]))
    made = pa.table({"image": images, "label": label})
    parquet.write_table(made, tmp_path / "a.parquet", compression="none", store_schema=False)
    source = open_source(tmp_path / "a.parquet")
    assert (len(source.entries), source.class_names) == (rows, (name,))


def test_a_number_is_taken_before_a_name(files: list[bytes], tmp_path: Path) -> None:
    """As ImageNet's tables hold both."""
    named = table(files, 0, 3, features=False, label=["a", "b", "c"], cls=[2, 0, 1])
    assert [entry.label for entry in open_source(write_table(tmp_path / "a.parquet", named)).entries] == [2, 0, 1]


def test_a_label_column_that_is_neither_numbers_nor_names_is_named(files: list[bytes], tmp_path: Path) -> None:
    for number, values in enumerate(([0.5, 1.0, 2.0], [[0], [1], [2]])):
        file = write_table(tmp_path / f"{number}.parquet", table(files, 0, 3, features=False, label=values))
        with pytest.raises(
            DataError, match=r"the column 'label' of '.*' holds (double|list.*), neither class numbers nor names"
        ):
            open_source(file)


def write_bomb(path: Path, image: bytes, rows: int) -> Path:
    """Write a file in which all rows are one image, which the file holds once."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    same = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([image]))
    paths = pa.array([hashlib.sha256(bytes([row])).hexdigest() for row in range(rows)])
    made = pa.table({"image": pa.StructArray.from_arrays([same, paths], ["bytes", "path"])})
    parquet.write_table(made, path, compression="zstd", store_schema=False)
    return path


BOMB = """
import sys
from pathlib import Path
from vrpo.data.prepare import prepare

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

import pyarrow.parquet
before = peak()
prepare(sys.argv[1], sys.argv[2], size=16, workers=1, progress=False)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak of memory in /proc")
def test_a_parquet_bomb_takes_the_memory_of_one_row(files: list[bytes], tmp_path: Path) -> None:
    """Ten kilobytes on disk, and a gigabyte in memory if the rows were read together."""
    rows, image = 60, files[0] + bytes(16 << 20)
    file = write_bomb(tmp_path / "bomb.parquet", image, rows)
    assert file.stat().st_size < 20_000
    command = [sys.executable, "-c", BOMB, str(file), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 15 * len(image) / 1024  # kilobytes; all rows take 60 images and more
    dataset = ShardedDataset(tmp_path / "out")
    assert len(dataset) == rows
    for row in dataset.read(np.arange(rows))[0]:
        np.testing.assert_array_equal(row.numpy(), decode(files[0], 16)[0])


def test_a_parquet_page_that_would_fill_the_memory_is_refused(files: list[bytes], tmp_path: Path) -> None:
    file = write_bomb(tmp_path / "bomb.parquet", files[0] + bytes(80 << 20), 20)
    with pytest.raises(
        DataError, match=r"bomb.parquet' would grow from [\d,]+ to 83,8[\d,]+ bytes, as no file of images"
    ):
        open_source(file)


DAMAGED = """
import sys
from pathlib import Path
from vrpo.data.sources import open_source
from vrpo.errors import VrpoError

file = Path(sys.argv[1])
whole = bytearray(file.read_bytes())
tried = 0
for place in range(len(whole) - 8 - int.from_bytes(whole[-8:-4], "little"), len(whole)):
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    try:
        open_source(file)
    except VrpoError:
        pass
    tried += 1
print(tried)
"""


@pytest.mark.parametrize("named", [False, True])
def test_a_damaged_description_of_a_parquet_file_does_not_end_the_process(
    files: list[bytes], tmp_path: Path, named: bool
) -> None:
    """pyarrow ends it with a signal where statistics of a column are damaged and the column is asked for."""
    labels = {"label": [CLASSES[i % 3] for i in range(COUNT)]} if named else {}
    file = write_table(tmp_path / "train.parquet", table(files, 0, COUNT, features=not named, **labels))
    done = subprocess.run([sys.executable, "-c", DAMAGED, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert int(done.stdout) > 500


def test_a_damaged_parquet_page_costs_the_rest_of_its_group(files: list[bytes], tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "train.parquet"
    options = {"use_dictionary": False, "data_page_size": 1, "write_batch_size": 1, "compression": "zstd"}
    parquet.write_table(table(files, 0, COUNT), file, row_group_size=6, **options)
    content = bytearray(file.read_bytes())
    place = content.rindex(b"\x28\xb5\x2f\xfd", 0, content.index(files[3][-200:]))  # where its compressed page begins
    content[place] ^= 1
    file.write_bytes(content)
    manifest = make(file, tmp_path / "out").manifest
    lost = [int(image.key.removeprefix("train.parquet/")) for image in manifest.bad]
    assert lost in ([3, 4, 5], [2, 3, 4, 5])  # the reader looks a page ahead
    assert manifest.bad[0].reason.startswith("it cannot be read (")
    kept = [row for row in range(COUNT) if row not in lost]
    assert_rows(ShardedDataset(tmp_path / "out"), files, kept, [i % 3 for i in range(COUNT)])
