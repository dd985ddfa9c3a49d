"""Decoding in parallel: tasks go to worker processes, and few are under way at a time.

This module and what it imports stay light, because every worker imports them when it starts.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import cast

import numpy as np
from numpy.typing import NDArray

from vrpo.data.sources import Entry, LatentOpener, Opener
from vrpo.data.transforms import decode
from vrpo.errors import DataError

_RESULTS_PER_WORKER = 4
_SMALL_SOURCE = 8 << 20
_FEWER = "repeat with fewer --workers than {}, or a smaller --max-pixels; finished shards are kept."


@dataclass(frozen=True)
class Work:
    """What is done to every entry: images to squares of ``size``, and the source's own latents as they are.

    ``pixels`` is false where the source has none; ``latents`` is the shape (views, C, h, w) of an entry's latents, or
    None; with ``exact`` an image must have that size already, because the latents are of it.
    """

    size: int
    max_pixels: int
    pixels: bool = True
    latents: tuple[int, int, int, int] | None = None
    exact: bool = False


@dataclass(frozen=True)
class Decoded:
    """The result of one task on the entries ``kept``, and why others were not.

    Pixels are uint8 (n, 3, S, S), latents float16 (n, views, C, h, w).
    """

    pixels: NDArray[np.uint8] | None
    kept: list[int]
    bad: list[tuple[int, str]]
    upscaled: list[int]
    latents: NDArray[np.float16] | None = None


def decode_entries(opener: Opener, entries: Sequence[Entry], work: Work) -> Decoded:
    """Decode ``entries`` as ``work`` says; an image that cannot be read becomes a reason, not an error.

    Raises DataError where the source as a whole has gone.
    """
    try:
        opener.connect()
    except OSError as error:
        raise DataError(f"the source can no longer be read ({error}): put it back and repeat.") from error
    pixels = np.empty((len(entries), 3, work.size, work.size), dtype=np.uint8) if work.pixels else None
    latents = None if work.latents is None else np.empty((len(entries), *work.latents), dtype=np.float16)
    kept: list[int] = []
    bad: list[tuple[int, str]] = []
    upscaled: list[int] = []
    # No encoding of an image within the limit is larger than its raw RGBA pixels by more than headers.
    limit = 4 * work.max_pixels + (1 << 20)
    for i, entry in enumerate(entries):
        try:
            was_upscaled = False
            if pixels is not None:
                if entry.size > limit:
                    raise DataError(f"its {entry.size:,} bytes exceed any image of {work.max_pixels:,} pixels")
                with opener.open(entry) as stream:
                    data = stream.read(limit)
                pixels[len(kept)], was_upscaled = decode(data, work.size, work.max_pixels, work.exact)
            if latents is not None and work.latents is not None:
                latents[len(kept)] = cast(LatentOpener, opener).latents(entry)[: work.latents[0]]
        except MemoryError:
            raise
        except DataError as error:
            bad.append((i, str(error)))
        except Exception as error:  # a damaged zip member raises any of zlib's, zipfile's and the system's errors
            bad.append((i, f"it cannot be read ({error or type(error).__name__})"))
        else:
            kept.append(i)
            if was_upscaled:
                upscaled.append(i)
    return Decoded(
        None if pixels is None else pixels[: len(kept)],
        kept,
        bad,
        upscaled,
        None if latents is None else latents[: len(kept)],
    )


def decode_in_order(opener: Opener, tasks: Sequence[Sequence[Entry]], work: Work, workers: int) -> Generator[Decoded]:
    """Yield the results of ``tasks`` in their order, from ``workers`` processes, or from this one where 1.

    Raises DataError where memory runs out or a worker is lost, which is named with what it was decoding.
    """
    try:
        if workers <= 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for task in tasks:
                    yield decode_entries(opener, task, work)
        else:
            yield from _decode_by_processes(opener, tasks, work, min(workers, len(tasks)))
    except MemoryError as error:
        raise DataError(f"decoding ran out of memory: {_FEWER.format(workers)}") from error


def worker_count(workers: int | None, remaining: Sequence[Entry], sharing: int = 1) -> int:
    """Return ``workers``, or one per core, but one where a few small images are not worth a process.

    The cores of a machine are shared by ``sharing`` processes that call this.
    """
    if workers is not None:
        return max(1, workers)
    if sum(entry.size for entry in remaining) < _SMALL_SOURCE:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // sharing)


def _decode_by_processes(
    opener: Opener, tasks: Sequence[Sequence[Entry]], work: Work, workers: int
) -> Generator[Decoded]:
    # A forked copy of a process with threads (torch, a progress bar) may deadlock; a spawned one starts afresh.
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, SpawnProcess] = {}
    working: dict[Connection, int] = {}
    idle: list[Connection] = []
    results: dict[int, Decoded] = {}
    sent = received = 0
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, opener, work), daemon=True)
            process.start()
            theirs.close()  # so that the end of the worker is the end of the stream
            processes[ours] = process
            idle.append(ours)
        while received < len(tasks):
            # A worker gets a task only while it listens, so neither side can block the other.
            while idle and sent < min(len(tasks), received + workers * _RESULTS_PER_WORKER):
                connection = idle.pop()
                working[connection] = sent
                with _losing(processes[connection], tasks[sent], workers):
                    connection.send(tasks[sent])
                sent += 1
            for ready in cast("list[Connection]", wait(list(working))):
                with _losing(processes[ready], tasks[working[ready]], workers):
                    answer = ready.recv()
                if isinstance(answer, Exception):
                    raise answer
                results[working.pop(ready)] = answer
                idle.append(ready)
            while received in results:
                yield results.pop(received)
                received += 1
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.join()


@contextmanager
def _losing(process: SpawnProcess, task: Sequence[Entry], workers: int) -> Iterator[None]:
    """Raise DataError where the worker that was given ``task`` is found to be gone."""
    try:
        yield
    except (EOFError, ConnectionError) as error:
        process.join(5)
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        if code == -signal.SIGKILL:
            how += ", as the system does where memory runs out,"
        more = f" to '{task[-1].key}'" if len(task) > 1 else ""
        raise DataError(
            f"decoding process {process.pid}, one of {workers}, {how} at '{task[0].key}'{more}: "
            f"{_FEWER.format(workers)}"
        ) from error


def _serve(connection: Connection, opener: Opener, work: Work) -> None:
    """Answer tasks until the parent terminates this process or, having been killed, closes the stream."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent ends the work
    warnings.simplefilter("ignore")
    while True:
        try:
            entries = connection.recv()
        except (EOFError, OSError):
            return
        answer: Decoded | Exception
        try:
            answer = decode_entries(opener, entries, work)
        except Exception as error:
            answer = error
        try:
            connection.send(answer)
        except OSError:
            return
