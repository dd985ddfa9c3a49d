"""Telemetry of a run: sums on the device between records, one JSON object a line on disk."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from vrpo.files import write_text
from vrpo.processes import ALONE, World
from vrpo.untrusted import parse_json, seal, unseal


class Meter:
    """Means of values by name between two records, over all processes, kept on the device."""

    def __init__(self, world: World = ALONE) -> None:
        self._world = world
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add one detached value, a scalar or a vector."""
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, Any]:
        """Return the means and forget them. This is where the host waits for the device."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return {name: plain(mean) for name, mean in self._world.mean(means).items()}


class BinnedMean:
    """Mean of a per-sample value by time bin, over all processes."""

    def __init__(self, bins: int, device: torch.device, world: World = ALONE) -> None:
        self._world = world
        self._sums = torch.zeros(2, bins, device=device)

    def add(self, values: Tensor, time: Tensor) -> None:
        """Add values (B,) at times (B,) in [0, 1]."""
        bins = self._sums.shape[1]
        index = (time * bins).long().clamp(0, bins - 1)
        self._sums[0].index_add_(0, index, values.detach().float())
        self._sums[1].index_add_(0, index, torch.ones_like(values, dtype=torch.float32))

    def take(self) -> list[float | None]:
        """Return the mean of each bin, None where it is empty, and forget them."""
        self._world.add_up(self._sums)
        means = plain(self._sums[0] / self._sums[1])
        self._sums.zero_()
        return means


def plain(value: Tensor) -> Any:
    """Return a tensor as numbers for JSON: what is not finite becomes None."""
    numbers = value.tolist()
    if isinstance(numbers, list):
        return [number if math.isfinite(number) else None for number in numbers]
    return numbers if math.isfinite(numbers) else None


class Journal:
    """``metrics.jsonl`` of a run."""

    def __init__(self, path: Path | None, images: int, last: Mapping[str, int] | None = None) -> None:
        """Open the file for appending, dropping what an interrupted run wrote beyond ``images``.

        Lines that are not as they were written are left out and counted in ``damaged``. Without a path nothing is
        written, and ``last`` says at how many images each kind was written last.
        """
        self.path = path
        self.last: dict[str, int] = dict(last or {})
        self.damaged = 0
        self._file: TextIO | None = None
        if path is not None:
            self._open(path, images)

    def _open(self, path: Path, images: int) -> None:
        kept = []
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                record = unseal(parse_json(line), required=False)
                if record["images"] <= images:
                    kept.append(line.decode())
                    self.last[record["kind"]] = record["images"]
            except (ValueError, KeyError, TypeError, AttributeError):
                self.damaged += number < len(lines)  # the last one may be torn by an interruption
        write_text(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def has(self, kind: str, images: int) -> bool:
        """Whether the newest record of this kind is of ``images`` images."""
        return self.last.get(kind) == images

    def write(self, kind: str, **values: Any) -> None:
        """Append one record."""
        self.last[kind] = values["images"]
        if self._file is not None:
            self._file.write(json.dumps(seal({"kind": kind, **values})) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Stopwatch:
    """Time spent in marked sections, on the device's own clock where there is one."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    @contextmanager
    def section(self) -> Iterator[None]:
        """Count the time of what is inside."""
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def take(self) -> float:
        """Return the seconds so far and forget them; the device must have been waited for."""
        seconds = self._seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return seconds


class Window:
    """Training time since the last record, pauses excluded."""

    def __init__(self, images: int) -> None:
        self.seconds, self.waited, self.images = 0.0, 0.0, images
        self._since: float | None = None
        self._fresh = True

    def start(self, waited: float) -> None:
        self._since = time.perf_counter()
        if self._fresh:
            self.waited, self._fresh = waited, False

    def stop(self) -> float:
        """Return the seconds since ``start``."""
        elapsed = 0.0 if self._since is None else time.perf_counter() - self._since
        self._since = None
        self.seconds += elapsed
        return elapsed

    def reset(self, images: int) -> None:
        self.seconds, self.images, self._fresh = 0.0, images, True


def memory_mb(device: torch.device) -> float | None:
    """Return in MB the device's peak since the last call, or what a CPU process holds now; None where unknown."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return round(peak / 2**20, 1)
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None  # only Linux tells
    return round(pages * 4096 / 2**20, 1)
