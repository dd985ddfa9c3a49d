"""A prepared data set and a finished run."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from latent_preparation import KINDS, contents, make, write_sources
from small_run import tiny_config, tiny_data

from vrpo.training.trainer import train


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``data`` (token cache included), ``run`` and the hidden features of neither."""
    folder = tmp_path_factory.mktemp("finished")
    train(tiny_config(tiny_data(folder / "data"), sample_every=16), folder / "run", say=lambda sentence: None)
    return folder


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
