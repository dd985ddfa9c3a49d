"""Files that are whole or absent: what has its name is on the disk, in every writer."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from vrpo.evaluation import reference
from vrpo.files import is_unfinished, load_tensors, replacing, save_tensors, tensors_hash, write_text
from vrpo.sampling.files import write_npz
from vrpo.vision import convnet


def write_reference(path: Path) -> None:
    class Small:
        def save(self, file: Path) -> None:
            file.write_bytes(b"numbers")

    reference._keep(path, Small())  # type: ignore[arg-type]


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: write_text(path, "whole"),
    "samples": lambda path: write_npz([np.zeros((1, 2, 2, 3), np.uint8)], (1, 2, 2, 3), None, path, "how"),
    "reference": write_reference,
    "encoder": lambda path: convnet._save(torch.nn.Linear(2, 2), path, "record"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_reaches_the_disk_before_its_name_and_the_name_after(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        assert is_unfinished(Path(source))
        done.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    WRITERS[name](tmp_path / "file.npz")
    assert done == ["file", "name", "folder"]
    assert [path.name for path in tmp_path.iterdir()] == ["file.npz"]


def test_what_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def interrupted() -> None:
        with replacing(path) as unfinished:
            unfinished.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_hash_of_tensors_is_what_fingerprints_and_seals_were_made_with(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.float32).view(2, 3)
    state = {
        "weight": values.t(),
        "brief": values.bfloat16(),
        "count": torch.tensor(3),
        "mask": values > 2,
        "empty": torch.zeros(0, 4),
    }
    digest = "d25f8ababc966bd16e1e1c6523d5732443501be994671bb0d32e6855dd6f4265"
    assert tensors_hash(state) == digest
    assert tensors_hash({**state, "count": torch.tensor(4)}) != digest
    save_tensors(tmp_path / "sealed", state, seal=True)
    with safe_open(tmp_path / "sealed", framework="pt") as file:
        assert file.metadata() == {"seal": digest}
    assert load_tensors(tmp_path / "sealed", sealed=True).keys() == state.keys()
