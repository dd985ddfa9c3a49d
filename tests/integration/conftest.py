"""A prepared data set and a finished run."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from latent_preparation import KINDS, contents, make, write_sources
from small_run import tiny_config, tiny_data

from vrpo.training.trainer import train


@pytest.fixture(scope="session")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(tiny_config(tiny_data(folder / "data"), sample_every=16), folder / "run", say=lambda sentence: None)
    return folder


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of every file below a folder."""
    found = {str(file): file.stat() for file in folder.rglob("*") if file.is_file()}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}


@pytest.fixture
def finished(_shared: Path) -> Iterator[Path]:
    """A folder with ``data`` (token cache included) and ``run``, for reading: a test that writes works on a copy.

    All tests see the same folder, so what one of them left there would make the next depend on their order.
    """
    before = _files(_shared)
    yield _shared
    assert _files(_shared) == before, "the test changed what other tests read: let it work on a copy"


@pytest.fixture(scope="session")
def latent_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an autoencoder and the folders of REPA and LightningDiT."""
    return write_sources(tmp_path_factory.mktemp("latent-sources"))


@pytest.fixture(scope="session")
def undisturbed(latent_sources: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Every file of each kind of data set with latents, prepared without interruption."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for kind in KINDS:
        make(kind, latent_sources, folder / kind)
    return {kind: contents(folder / kind) for kind in KINDS}


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """Return a function after which the n-th file that is flushed to the disk is refused for want of space."""

    def start(number: int) -> list[str]:
        seen: list[str] = []
        original = os.fsync

        def fsync(descriptor: int) -> None:
            seen.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            if len(seen) == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            original(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        return seen

    return start
