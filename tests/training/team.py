"""Processes that stay ready, so that tests of several of them do not each wait for torch to load."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

JOB_SECONDS = 120


class Team:
    """Up to ``size`` processes that run functions together, as a launcher would start them."""

    def __init__(self, size: int) -> None:
        # Forked from a server that has loaded everything once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["vrpo.training.trainer", "timm"])
        self._members = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._members.append((process, ours))

    def run(self, size: int, function: Callable[..., Any], *arguments: Any, **environment: str) -> list[Any]:
        """Return what ``function(*arguments)`` returns in each of ``size`` processes."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(size):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            names = {**places, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
            self._members[rank][1].send((function, arguments, {name: str(value) for name, value in names.items()}))
        answers = []
        for rank in range(size):
            assert self._members[rank][1].poll(JOB_SECONDS), f"process {rank} of {size} does not answer"
            done, answer = self._members[rank][1].recv()
            assert done, f"process {rank} of {size}:\n{answer}"
            answers.append(answer)
        return answers

    def close(self) -> None:
        for process, connection in self._members:
            connection.close()
            process.terminate()
            process.join()


def _serve(connection: Any) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, arguments, environment = connection.recv()
        except EOFError:
            return
        os.environ.update(environment)
        try:
            connection.send((True, function(*arguments)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


def train(
    config: dict[str, Any], folder: Path, resume: bool = False, images: int | None = None
) -> tuple[str, list[str], bool, list[int]]:
    """Train in this process's place, up to ``images`` if given.

    Returns how it ended, what was said, whether an error is silent, and the rows of the data set that were trained on.
    """
    from vrpo.config_load import validate
    from vrpo.errors import VrpoError
    from vrpo.processes import connect
    from vrpo.training.trainer import Trainer

    said: list[str] = []
    rows: list[int] = []
    with connect() as world:
        try:
            trainer = Trainer(validate(config, "the test"), folder, resume=resume, say=said.append, world=world)
            step = trainer._train_step

            def watched(batch: Any) -> None:
                rows.extend(batch.indices.tolist())
                step(batch)
                if images is not None and trainer.images + trainer.config.train.batch_size >= images:
                    os.kill(os.getpid(), signal.SIGTERM)

            trainer._train_step = watched  # type: ignore[method-assign]
            return trainer.train().status, said, False, rows
        except VrpoError as error:
            return f"{type(error).__name__}: {error}", said, error.silent, rows


def train_spoiled(config: dict[str, Any], folder: Path) -> tuple[str, bool, str, bool]:
    """Train while one image of the second process has an infinite loss in every step.

    Returns how it ended, whether that is silent here, the key of that image in the first step, and whether the weights
    are still the initial ones.
    """
    import torch

    from vrpo.config_load import validate
    from vrpo.errors import VrpoError
    from vrpo.processes import connect
    from vrpo.training.trainer import Trainer

    with connect() as world:
        trainer = Trainer(validate(config, "the test"), folder, say=lambda sentence: None, world=world)
        before = [parameter.detach().clone() for parameter in trainer.parts.trunk.parameters()]
        key = trainer.parts.dataset.key(int(trainer.loader.indices(0)[1]))
        loss = trainer.parts.denoising.loss

        def spoiled(*arguments: Any) -> torch.Tensor:
            values = loss(*arguments)
            return values + torch.where(torch.arange(len(values)) == 1, torch.inf, 0.0)

        if world.rank == 1:
            trainer.parts.denoising.loss = spoiled  # type: ignore[method-assign]
        try:
            told, silent = trainer.train().status, False
        except VrpoError as error:
            told, silent = str(error), error.silent
        after = trainer.parts.trunk.parameters()
        return told, silent, key, all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def train_told(config: dict[str, Any], folder: Path, resume: bool, what: str, images: int) -> tuple[str, int, int]:
    """Train or go on, where the second process is told to stop while ``what`` is measured at ``images`` images.

    Returns how it ended, after how many images, and how many batches were measured at that number of images.
    """
    from vrpo.config_load import validate
    from vrpo.processes import connect
    from vrpo.training.trainer import Trainer

    with connect() as world:
        run = Trainer(validate(config, "the test"), folder, resume=resume, say=lambda _: None, world=world)
        place: Any = run.observer._validation if what == "validation" else run.observer._sampler
        name = "_measure" if what == "validation" else "_group"
        measure, calls = getattr(place, name), 0

        def told(*arguments: Any) -> Any:
            nonlocal calls
            if run.images == images:
                calls += 1
                if calls == 1 and world.rank == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
            return measure(*arguments)

        setattr(place, name, told)
        result = run.train()
        return result.status, result.images, calls


def wait_for_silence() -> tuple[str, float]:
    """Ask the second process, which does not answer, whether to stop; return what is told of that, and the seconds."""
    import time
    from datetime import timedelta

    from vrpo.errors import VrpoError
    from vrpo.processes import connect
    from vrpo.training import stop

    begin = time.monotonic()
    patience, stop.SIGNAL_TIMEOUT = stop.SIGNAL_TIMEOUT, timedelta(seconds=1)
    try:
        with connect() as world:
            if not world.first:
                world.store.wait(["told"], timedelta(seconds=60))
                return "silent", 0.0
            signals = stop.SharedSignal(world)
            try:
                for _ in range(2):
                    signals.agree(None)
            finally:
                world.store.set("told", "")
        return "answered", 0.0
    except VrpoError as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - begin
    finally:
        stop.SIGNAL_TIMEOUT = patience


def count_reductions(config: dict[str, Any], folder: Path) -> list[int]:
    """Train, and return how often tensors of several processes were added up in each step but the first and last."""
    from torch.profiler import ProfilerActivity, profile

    from vrpo.config_load import validate
    from vrpo.processes import connect
    from vrpo.training.trainer import Trainer

    counts: list[int] = []
    with connect() as world:
        run = Trainer(validate(config, "the test"), folder, say=lambda sentence: None, world=world)
        step = run._train_step

        def counted(batch: Any) -> None:
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                step(batch)
            names = [event.name for event in profiler.events()]
            counts.append(sum(name.startswith(("gloo:all_reduce", "gloo:reduce_scatter")) for name in names))

        run._train_step = counted  # type: ignore[method-assign]
        run.train()
    return counts[1:-1]
