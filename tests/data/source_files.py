"""Archives and tables of images for tests of sources, and their rows held against the images."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from vrpo.data.prepare import prepare
from vrpo.data.shards import ShardedDataset
from vrpo.data.transforms import decode

COUNT = 12


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def make(source: Path | str, out: Path, **options) -> ShardedDataset:
    prepare(source, out, **({"size": 16, "workers": 1, "progress": False} | options))
    return ShardedDataset(out)


def assert_rows(dataset: ShardedDataset, files: list[bytes], order: list[int], labels: list[int]) -> None:
    pixels, told = dataset.read(np.arange(len(order)))
    assert told is not None
    assert told.tolist() == [labels[i] for i in order]
    for row, i in enumerate(order):
        np.testing.assert_array_equal(pixels[row].numpy(), decode(files[i], 16)[0])


def table(files: list[bytes], start: int, stop: int, features: bool = True, **columns):
    pa = pytest.importorskip("pyarrow")
    content = {
        "image": [{"bytes": files[i], "path": f"{i}.png"} for i in range(start, stop)],
        "label": [i % 3 for i in range(start, stop)],
    } | columns
    made = pa.table({name: values for name, values in content.items() if values is not None})
    names = {"info": {"features": {"label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}}}}
    return made.replace_schema_metadata({"huggingface": json.dumps(names)}) if features else made


def write_table(path: Path, made, group: int = 4) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(made, path, row_group_size=group)
    return path
