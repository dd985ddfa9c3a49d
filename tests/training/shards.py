"""What the processes of a team do with the checkpoints that they write together."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Any


def _trainer(config: dict[str, Any], folder: Path, world: Any) -> Any:
    from vrpo.config_load import validate
    from vrpo.training.trainer import Trainer

    return Trainer(validate(config, "the test"), folder, say=lambda sentence: None, world=world)


def slow_writes(config: dict[str, Any], folder: Path, bad_steps: bool) -> tuple[str, bool]:
    """Train until every step after the first checkpoint is not finite, or all fail, while that is written slowly.

    Returns how it ended, and whether this process was still writing then.
    """
    import torch

    from vrpo.errors import CheckpointError, VrpoError
    from vrpo.processes import connect

    with connect() as world:
        run = _trainer(config, folder, world)
        step, loss, write = run._train_step, run.parts.denoising.loss, run._writer._write

        def troubled(batch: Any) -> None:
            if run.step == 5 and not bad_steps:
                with world.agreed():
                    if world.rank == 1:
                        raise CheckpointError("a file is gone.")
            step(batch)

        def slow(*arguments: Any) -> None:
            time.sleep(1.5)
            write(*arguments)

        def spoiled(*arguments: Any) -> torch.Tensor:
            return loss(*arguments) * (torch.nan if bad_steps and run.step >= 4 else 1)

        run._train_step, run._writer._write, run.parts.denoising.loss = troubled, slow, spoiled
        try:
            told = run.train().status
        except VrpoError as error:
            told = f"{type(error).__name__}: {error}"
        thread = run._writer._thread
        return told, thread is not None and thread.is_alive()


def synced_files(config: dict[str, Any], folder: Path) -> set[int]:
    """Train, and return the numbers (inodes) of all files that were flushed to disk."""
    from vrpo.processes import connect

    synced: set[int] = set()
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    os.fsync = noted
    try:
        with connect() as world:
            _trainer(config, folder, world).train()
    finally:
        os.fsync = fsync
    return synced


def limited_writes(config: dict[str, Any], folder: Path, rank: int) -> str:
    """Train while process ``rank`` may write no file beyond 16 kB after the first checkpoint; return how it ended."""
    from vrpo.errors import VrpoError
    from vrpo.processes import connect

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with connect() as world:
        run = _trainer(config, folder, world)
        step = run._train_step

        def limiting(batch: Any) -> None:
            step(batch)
            if run.step == 5:
                run._writer.wait()
                if world.rank == rank:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, limits[1]))

        run._train_step = limiting
        try:
            return run.train().status
        except VrpoError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
