"""Decoding in parallel: tasks go to worker processes, and few are under way at a time.

This module and what it imports stay light, because every worker imports them when it starts.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vrpo.data.sources import Entry, Opener
from vrpo.data.transforms import decode
from vrpo.errors import DataError

_TASKS_PER_WORKER = 3
_SMALL_SOURCE = 8 << 20


@dataclass(frozen=True)
class Decoded:
    """The result of one task: pixels uint8 (n, 3, S, S) of the entries ``kept``, and why others were not."""

    pixels: NDArray[np.uint8]
    kept: list[int]
    bad: list[tuple[int, str]]
    upscaled: list[int]


def decode_entries(opener: Opener, entries: Sequence[Entry], size: int, max_pixels: int) -> Decoded:
    """Decode ``entries`` to squares of ``size``; an image that cannot be read becomes a reason, not an error.

    Raises DataError where the source as a whole has gone.
    """
    try:
        opener.connect()
    except OSError as error:
        raise DataError(f"the source can no longer be read ({error}): put it back and repeat.") from error
    pixels = np.empty((len(entries), 3, size, size), dtype=np.uint8)
    kept: list[int] = []
    bad: list[tuple[int, str]] = []
    upscaled: list[int] = []
    # No encoding of an image within the limit is larger than its raw RGBA pixels by more than headers.
    limit = 4 * max_pixels + (1 << 20)
    for i, entry in enumerate(entries):
        try:
            if entry.size > limit:
                raise DataError(f"its {entry.size:,} bytes exceed any image of {max_pixels:,} pixels")
            with opener.open(entry) as stream:
                data = stream.read(limit)
            pixels[len(kept)], was_upscaled = decode(data, size, max_pixels)
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
    return Decoded(pixels[: len(kept)], kept, bad, upscaled)


def decode_in_order(
    opener: Opener, tasks: Iterable[Sequence[Entry]], size: int, max_pixels: int, workers: int
) -> Generator[Decoded]:
    """Yield the results of ``tasks`` in their order, from ``workers`` processes, or from this one where 1.

    Raises DataError where a worker is killed or memory runs out.
    """
    try:
        if workers <= 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for task in tasks:
                    yield decode_entries(opener, task, size, max_pixels)
        else:
            yield from _decode_by_processes(opener, tasks, size, max_pixels, workers)
    except (BrokenProcessPool, MemoryError) as error:
        raise DataError(
            f"decoding with {workers} workers ran out of memory or lost a worker: "
            "repeat with fewer --workers; finished shards are kept."
        ) from error


def worker_count(workers: int | None, remaining: Sequence[Entry]) -> int:
    """Return ``workers``, or one per core, but one where a few small images are not worth a process."""
    if workers is not None:
        return max(1, workers)
    if sum(entry.size for entry in remaining) < _SMALL_SOURCE:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decode_by_processes(
    opener: Opener, tasks: Iterable[Sequence[Entry]], size: int, max_pixels: int, workers: int
) -> Generator[Decoded]:
    # A forked copy of a process with threads (torch, a progress bar) may deadlock; a spawned one starts
    # afresh.
    executor = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(opener,)
    )
    pending: deque[Future[Decoded]] = deque()
    try:
        for task in tasks:
            pending.append(executor.submit(_work, task, size, max_pixels))
            if len(pending) >= workers * _TASKS_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


_opener: Opener | None = None  # set once in each worker process, so that an archive is opened once


def _start_worker(opener: Opener) -> None:
    global _opener
    _opener = opener
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the work on Ctrl-C
    warnings.simplefilter("ignore")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Leave when the parent is killed: the task queue alone would keep a worker waiting for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(entries: Sequence[Entry], size: int, max_pixels: int) -> Decoded:
    assert _opener is not None
    return decode_entries(_opener, entries, size, max_pixels)
