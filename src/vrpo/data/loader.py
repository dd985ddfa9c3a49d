"""Batches whose content is a pure function of (seed, step), read ahead by one background thread.

The order has no state: global position p = step B + j lies in epoch p // N, and the sample there is entry p
mod N of that epoch's permutation. Epochs follow each other without a gap, so nothing is dropped, and a
resumed run continues with the batch that an uninterrupted one would have read.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from vrpo.data.transforms import mirror
from vrpo.errors import ConfigError, DataError, VrpoError
from vrpo.randomness import STREAM_FLIP, STREAM_ORDER, mix

# Seconds after which a silent data thread is asked whether it lives.
_PATIENCE = 5.0

if TYPE_CHECKING:
    from torch import Tensor


class Dataset(Protocol):
    """What a loader reads: a length and random access to rows."""

    def __len__(self) -> int: ...

    def read(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """Return pixels uint8 (B, C, H, W) and labels int64 (B,) or None."""


class LatentRows(Protocol):
    """A data set that stores latents."""

    def read_latents(self, indices: NDArray[np.int64], flipped: NDArray[np.bool_] | None = None) -> Tensor:
        """Return latents float16 (B, C, h, w), those of the mirror image where ``flipped`` (B,)."""

    def labels(self) -> NDArray[np.int64] | None:
        """Return all labels int64 (N,) or None."""


class CachedRows(Protocol):
    """What was computed of every row beforehand, such as an encoder's tokens."""

    def read(self, indices: NDArray[np.int64], flipped: NDArray[np.bool_] | None, pinned: bool) -> Tensor:
        """Return rows (B, F), those of the mirror image where ``flipped`` (B,), in page-locked memory on ``pinned``."""


@dataclass(frozen=True)
class Batch:
    """The samples of one step on one rank.

    Rows ``indices`` int64 (B,), ``pixels`` uint8 (B, C, H, W) or None where they are not read, ``labels`` int64 (B,) or
    None, ``flipped`` bool (B,), true where the sample is mirrored, stored ``latents`` float16 (B, C, h, w) or None, and
    the rows (B, F) of each of the loader's ``caches``.
    """

    step: int
    indices: NDArray[np.int64]
    pixels: Tensor | None
    labels: Tensor | None
    flipped: Tensor
    latents: Tensor | None = None
    cached: tuple[Tensor, ...] = ()


class BatchOrder:
    """Which of ``size`` samples the global batch of each step holds: every sample once in every epoch."""

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self._permutation: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, dtype=np.int64))

    def indices(self, step: int) -> NDArray[np.int64]:
        """Return the samples of the batch at ``step``, int64 (batch_size,)."""
        positions = self._positions(step)
        epochs, offsets = np.divmod(positions, self.size)
        indices = np.empty_like(positions)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            within = epochs == epoch
            indices[within] = self._epoch(epoch)[offsets[within]]
        return indices

    def flips(self, step: int) -> NDArray[np.bool_]:
        """Return a coin for every sample of the batch at ``step``, anew in each epoch, bool (batch_size,)."""
        coins = hash_positions(mix(self.seed, STREAM_FLIP), self._positions(step)) >> np.uint64(63)
        return coins.astype(bool)

    def _positions(self, step: int) -> NDArray[np.int64]:
        return step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        cached, permutation = self._permutation
        if cached != epoch:
            # Sorting by hash is a uniform permutation that, unlike a library's shuffle, no release can
            # change.
            keys = hash_positions(mix(self.seed, STREAM_ORDER, epoch), np.arange(self.size, dtype=np.int64))
            permutation = np.argsort(keys, kind="stable").astype(np.int64)
            self._permutation = (epoch, permutation)
        return permutation


def hash_positions(key: int, positions: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return outputs ``positions`` of the SplitMix64 sequence of ``key`` (Steele et al. 2014), uint64."""
    with np.errstate(over="ignore"):
        state = np.uint64(key) + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))


class Loader:
    """Reads this rank's share of every global batch, ``prefetch`` batches ahead.

    ``batch_size`` is global; rank r takes rows r B/W .. (r + 1) B/W - 1 of each batch. ``flip`` mirrors
    samples at random, each with probability one half. ``wait_seconds`` is the time that consumers have waited
    for data so far. With ``latents`` those are read too, and without ``pixels`` only they are; of ``caches`` the same
    rows are read. Up to ``prefetch`` + 2 batches are in memory at one time. Raises ConfigError where the batch cannot
    be divided among the ranks.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        flip: bool,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 4,
        pin_memory: bool = False,
        latents: LatentRows | None = None,
        pixels: bool = True,
        caches: Sequence[CachedRows] = (),
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            below = max(world_size, batch_size // world_size * world_size)
            raise ConfigError(
                f"a batch of {batch_size} cannot be divided among {world_size} processes: the nearest size is {below}."
            )
        self.dataset = dataset
        self.order = BatchOrder(len(dataset), batch_size, seed)
        self.flip = flip
        self.prefetch = prefetch
        self.pin_memory = pin_memory
        self.latents = latents
        self.pixels = pixels
        self.caches = caches
        self.wait_seconds = 0.0
        share = batch_size // world_size
        self._share = slice(rank * share, (rank + 1) * share)

    def indices(self, step: int) -> NDArray[np.int64]:
        """Return the rows that this rank reads at ``step``."""
        return self.order.indices(step)[self._share]

    def batch(self, step: int) -> Batch:
        """Read the batch at ``step`` now, in this thread."""
        import torch

        indices = self.indices(step)
        flips = self.order.flips(step)[self._share] if self.flip else np.zeros(len(indices), dtype=bool)
        flipped = torch.from_numpy(flips)
        pixels: Tensor | None = None
        latents: Tensor | None = None
        labels: Tensor | None = None
        if self.latents is not None:
            latents = self.latents.read_latents(indices, flips)
            known = self.latents.labels()
            labels = None if known is None else torch.from_numpy(known[indices])
        if self.pixels:
            pixels, labels = self.dataset.read(indices)
            if self.flip:
                pixels = mirror(pixels, flipped)
        if self.pin_memory:
            pixels, labels, latents = (
                None if part is None else part.pin_memory() for part in (pixels, labels, latents)
            )
            flipped = flipped.pin_memory()
        cached = tuple(cache.read(indices, flips, self.pin_memory) for cache in self.caches)
        return Batch(step, indices, pixels, labels, flipped, latents, cached)

    def batches(self, start_step: int, stop_step: int | None = None) -> Generator[Batch, None, None]:
        """Yield the batches from ``start_step`` up to but without ``stop_step``, or without end where None.

        The background thread ends with the iteration, also where the consumer breaks off. An exception in it
        is raised here, as a DataError that names the batch.
        """
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(self.prefetch)
        stopped = threading.Event()
        thread = threading.Thread(
            target=self._read_ahead,
            args=(start_step, stop_step, ready, stopped),
            name="vrpo-loader",
            daemon=True,
        )
        thread.start()
        try:
            while True:
                waiting = time.perf_counter()
                item = self._next(ready, thread)
                self.wait_seconds += time.perf_counter() - waiting
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            while thread.is_alive():  # a full queue may hold the thread
                try:
                    ready.get(timeout=0.01)
                except queue.Empty:
                    continue
            thread.join()

    def _read_ahead(
        self,
        start_step: int,
        stop_step: int | None,
        ready: queue.Queue[Batch | BaseException | None],
        stopped: threading.Event,
    ) -> None:
        step = start_step
        try:
            while not stopped.is_set() and (stop_step is None or step < stop_step):
                ready.put(self.batch(step))
                step += 1
            ready.put(None)
        except VrpoError as error:
            ready.put(error)
        except BaseException as error:  # whatever it is, the consumer must hear of it
            reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
            remedy = "check the data with `vrpo data verify`, then go on with --resume."
            if isinstance(error, MemoryError):
                reason, remedy = "memory ran out", "go on with --resume and a smaller --data.prefetch."
            told = DataError(
                f"the data thread failed at batch {step} of {getattr(self.dataset, 'path', 'the data')} ({reason}): "
                f"{remedy}"
            )
            told.__cause__ = error
            ready.put(told)

    @staticmethod
    def _next(
        ready: queue.Queue[Batch | BaseException | None], thread: threading.Thread
    ) -> Batch | BaseException | None:
        while True:
            try:
                return ready.get(timeout=_PATIENCE)
            except queue.Empty:
                if not thread.is_alive() and ready.empty():
                    return DataError("the data thread is gone without a word: go on with --resume.")
