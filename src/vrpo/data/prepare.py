"""From a source of images to shards: parallel, in deterministic order, and resumable at shard boundaries.

Shard s holds the readable images among entries s R .. (s + 1) R - 1 of the source, so its bytes depend
neither on the number of workers nor on where an earlier run was interrupted. Finished shards are noted in
``progress.jsonl``, which gives way to the manifest when the last one is written.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from vrpo.data.shards import (
    FORMAT_VERSION,
    MANIFEST,
    BadImage,
    Count,
    Counts,
    Manifest,
    Positive,
    Preprocessing,
    Record,
    ShardedDataset,
    ShardRecord,
    SourceRecord,
    fingerprint,
    write_atomically,
    write_shard,
)
from vrpo.data.sources import Entry, Source, open_source
from vrpo.data.transforms import MAX_PIXELS
from vrpo.data.workers import Decoded, decode_in_order, worker_count
from vrpo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

SHARD_BYTES = 256 << 20
# One image of this side is 48 MiB of pixels, of which a worker, a shard and a batch can still hold some.
MAX_SIZE = 4096
JOURNAL = "progress.jsonl"

_TASK_IMAGES = 256
_TASK_BYTES = 16 << 20
_NAMED_UPSCALED = 1000

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PrepareResult:
    """What ``prepare`` did: the folder and its manifest, the time it took, and what was there already."""

    path: Path
    manifest: Manifest
    seconds: float
    images_decoded: int
    resumed_shards: int
    already_complete: bool

    def summary(self) -> str:
        """Say in one line what the folder holds, and in further lines what was left out or scaled up."""
        counts, size = self.manifest.counts, self.manifest.preprocessing.size
        if self.already_complete:
            lines = [f"'{self.path}' already holds this data set ({counts.images:,} images): nothing to do."]
        else:
            classes = len(self.manifest.class_names)
            labels = f"{classes} classes" if classes else "no labels"
            rate = self.images_decoded / max(self.seconds, 1e-9)
            lines = [
                f"{counts.images:,} images of {size} x {size} ({labels}) in '{self.path}', "
                f"{self.seconds:.1f} s, {rate:,.0f} images/s."
            ]
        if self.resumed_shards:
            lines.append(f"{self.resumed_shards} finished shards of an earlier run were kept.")
        if self.manifest.bad:
            first = self.manifest.bad[0]
            lines.append(f"{counts.bad:,} could not be read (all listed in {MANIFEST}): '{first.key}': {first.reason}.")
        if counts.upscaled:
            lines.append(f"{counts.upscaled:,} are smaller than {size} pixels and were scaled up.")
        if counts.ignored:
            lines.append(f"{counts.ignored:,} files that are not images were passed over.")
        return "\n".join(lines)


def prepare(
    source: str | os.PathLike[str] | Source,
    out: str | os.PathLike[str],
    *,
    size: int,
    flip: bool = False,
    on_bad_image: Literal["skip", "fail"] = "skip",
    workers: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    max_pixels: int = MAX_PIXELS,
    progress: bool | Progress = True,
    console: Console | None = None,
) -> PrepareResult:
    """Write every image of ``source`` as uint8 (3, size, size) to shards in folder ``out``.

    A shard holds at most ``shard_bytes`` of pixels. ``flip`` tells readers to mirror at random. ``workers``
    processes decode (default: one per core; 1 decodes in this process). ``progress`` is a bar on ``console``,
    or a function of images done and in all. An interrupted call is continued by the same call, and a finished
    one does nothing.

    Raises DataError where the source holds nothing readable, where ``out`` holds anything else, at the first
    unreadable image with ``on_bad_image="fail"``, and where the disk is full; finished shards stay valid.
    """
    started = time.perf_counter()
    for option, value in (("--size", size), ("--max-pixels", max_pixels), ("--shard-mb", shard_bytes)):
        if value < 1:
            raise ConfigError(f"{option} cannot be {value}: it must be at least 1.")
    if size > MAX_SIZE:
        raise ConfigError(f"--size {size} is more than can be prepared: give at most {MAX_SIZE:,} pixels.")
    opened = source if isinstance(source, Source) else open_source(source)
    folder = Path(out).expanduser()
    if opened.kind == "folder" and folder.resolve().is_relative_to(opened.path):
        raise DataError(f"'{folder}' lies inside the source '{opened.path}': choose a folder outside it.")
    request = _Request(
        source=SourceRecord(name=opened.name, kind=opened.kind, listing=_listing(opened)),
        preprocessing=Preprocessing(size=size, flip="random" if flip else "none", max_pixels=max_pixels),
        rows_per_shard=max(1, shard_bytes // (3 * size * size)),
    )
    if (folder / MANIFEST).exists():
        manifest = ShardedDataset(folder).manifest
        request.refuse_other(folder, _Request.of(manifest))
        _refuse_bad(manifest.bad, on_bad_image)
        (folder / JOURNAL).unlink(missing_ok=True)
        return PrepareResult(folder, manifest, time.perf_counter() - started, 0, 0, True)

    with _disk_errors(folder):
        finished = _open_journal(folder, request)
    for earlier in finished:
        _refuse_bad(earlier.bad, on_bad_image)
    resumed, rows = len(finished), request.rows_per_shard
    total = len(opened.entries)
    remaining = opened.entries[resumed * rows :]
    tasks = list(_tasks(remaining, rows, size))
    decoded = decode_in_order(opened.opener, tasks, size, max_pixels, worker_count(workers, remaining))
    done = total - len(remaining)
    with _reporter(progress, console, opened.name, total, done) as report, closing(decoded):
        shard = _Shard(len(opened.class_names))
        for task, result in zip(tasks, decoded, strict=True):
            shard.add(task, result)
            _refuse_bad(shard.bad, on_bad_image)
            done += len(task)
            if done % rows == 0 or done == total:
                with _disk_errors(folder):
                    finished.append(shard.write(folder, len(finished)))
                    _append_to_journal(folder, finished[-1])
                shard = _Shard(len(opened.class_names))
            report(done, total)
    manifest = _manifest(opened, request, finished)
    with _disk_errors(folder):
        write_atomically(folder / MANIFEST, [manifest.to_json().encode()])
        (folder / JOURNAL).unlink()
    return PrepareResult(folder, manifest, time.perf_counter() - started, len(remaining), resumed, False)


class _Request(Record):
    """What must be equal for a call to continue, or to find done, what an earlier call began."""

    version: int = FORMAT_VERSION
    source: SourceRecord
    preprocessing: Preprocessing
    rows_per_shard: Positive

    @staticmethod
    def of(manifest: Manifest) -> _Request:
        return _Request(
            source=manifest.source,
            preprocessing=manifest.preprocessing,
            rows_per_shard=manifest.rows_per_shard,
        )

    def refuse_other(self, folder: Path, other: _Request) -> None:
        if self == other:
            return
        if (self.source.name, self.source.kind) != (other.source.name, other.source.kind):
            held = f"data from '{other.source.name}', not '{self.source.name}'"
        elif self.source != other.source:
            held = f"data from '{other.source.name}' before its files changed"
        elif self.preprocessing != other.preprocessing:
            mine, theirs = self.preprocessing.model_dump(), other.preprocessing.model_dump()
            name = next(name for name in mine if mine[name] != theirs[name])
            held = f"data prepared with {name} {theirs[name]}, not {mine[name]}"
        else:
            held = f"shards of {other.rows_per_shard} images, not {self.rows_per_shard}"
        raise DataError(f"'{folder}' holds {held}: choose another folder, or delete this one.")


class _Finished(Record):
    """A line of the journal: what became of the entries of one shard, None where none was readable."""

    shard: ShardRecord | None
    bad: tuple[BadImage, ...]
    upscaled: tuple[str, ...]
    upscaled_count: Count
    class_counts: tuple[Count, ...]


class _Shard:
    """The rows of the shard being decoded."""

    def __init__(self, num_classes: int) -> None:
        self.class_counts = [0] * num_classes
        self.blocks: list[NDArray[np.uint8]] = []
        self.kept: list[Entry] = []
        self.bad: list[BadImage] = []
        self.upscaled: list[str] = []

    def add(self, entries: list[Entry], result: Decoded) -> None:
        if result.kept:
            self.blocks.append(result.pixels)
        self.kept += [entries[i] for i in result.kept]
        self.bad += [BadImage(key=entries[i].key, reason=reason) for i, reason in result.bad]
        self.upscaled += [entries[i].key for i in result.upscaled]

    def write(self, folder: Path, index: int) -> _Finished:
        labels = [entry.label for entry in self.kept if entry.label is not None]
        for label in labels:
            self.class_counts[label] += 1
        keys = [entry.key for entry in self.kept]
        record = None
        if keys:
            record = write_shard(folder, index, self.blocks, labels if self.class_counts else None, keys)
        return _Finished(
            shard=record,
            bad=tuple(self.bad),
            upscaled=tuple(self.upscaled[:_NAMED_UPSCALED]),
            upscaled_count=len(self.upscaled),
            class_counts=tuple(self.class_counts),
        )


def _tasks(entries: Sequence[Entry], rows: int, size: int) -> Iterator[list[Entry]]:
    """Cut entries into tasks of bounded size that do not cross shards."""
    step = max(1, min(_TASK_IMAGES, _TASK_BYTES // (3 * size * size)))
    for shard in range(0, len(entries), rows):
        end = min(shard + rows, len(entries))
        for start in range(shard, end, step):
            yield list(entries[start : min(start + step, end)])


def _listing(source: Source) -> str:
    """Hash the source's keys, labels, sizes and checksums, to notice when its files change."""
    digest = hashlib.sha256()
    for entry in source.entries:
        digest.update(f"{entry.key}\0{entry.label}\0{entry.size}\0{entry.checksum}\n".encode())
    return digest.hexdigest()


def _open_journal(folder: Path, request: _Request) -> list[_Finished]:
    """Make the folder and its journal ready, and return the shards that an interrupted call finished."""
    file = folder / JOURNAL
    finished: list[_Finished] = []
    if file.exists():
        header, *lines = file.read_bytes().split(b"\n")
        try:
            version = json.loads(header)["version"]
            begun = _Request.model_validate_json(header) if version == FORMAT_VERSION else None
        except (ValueError, KeyError, TypeError) as error:  # a ValidationError is a ValueError
            raise DataError(f"'{file}' is damaged: delete '{folder}' and prepare the source again.") from error
        if begun is None:
            raise DataError(f"'{folder}' was begun in format {version} of another vrpo: choose another folder.")
        request.refuse_other(folder, begun)
        for line in lines:
            try:
                entry = _Finished.model_validate_json(line)
            except ValidationError:
                break  # a line cut off by a crash: its shard is made again
            if entry.shard is not None:
                shard = folder / entry.shard.file
                if not shard.exists() or shard.stat().st_size != entry.shard.bytes:
                    break
            finished.append(entry)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        others = sorted(child.name for child in folder.iterdir() if child.name != f".{JOURNAL}.tmp")
        if others:
            raise DataError(
                f"'{folder}' is not empty and holds no prepared data set (such as '{others[0]}'): "
                "choose an empty or new folder."
            )
    for leftover in folder.glob(".shard-*.tmp"):
        leftover.unlink()
    text = "".join(record.model_dump_json() + "\n" for record in (request, *finished))
    write_atomically(file, [text.encode()])
    return finished


def _append_to_journal(folder: Path, finished: _Finished) -> None:
    with open(folder / JOURNAL, "ab") as stream:
        stream.write(finished.model_dump_json().encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def _manifest(source: Source, request: _Request, finished: list[_Finished]) -> Manifest:
    shards = tuple(entry.shard for entry in finished if entry.shard is not None)
    bad = tuple(image for entry in finished for image in entry.bad)
    if not shards:
        raise DataError(
            f"none of the {len(bad):,} images in '{source.path}' can be read, "
            f"the first being '{bad[0].key}': {bad[0].reason}."
        )
    return Manifest(
        source=request.source,
        counts=Counts(
            images=sum(shard.rows for shard in shards),
            bad=len(bad),
            ignored=source.ignored,
            upscaled=sum(entry.upscaled_count for entry in finished),
        ),
        class_names=source.class_names,
        class_counts=tuple(map(sum, zip(*(entry.class_counts for entry in finished), strict=True))),
        preprocessing=request.preprocessing,
        rows_per_shard=request.rows_per_shard,
        shards=shards,
        bad=bad,
        upscaled=tuple(key for entry in finished for key in entry.upscaled)[:_NAMED_UPSCALED],
        fingerprint=fingerprint(request.preprocessing, shards),
    )


def _refuse_bad(bad: Sequence[BadImage], on_bad_image: str) -> None:
    if on_bad_image == "fail" and bad:
        raise DataError(
            f"'{bad[0].key}' cannot be used: {bad[0].reason}; repair or remove it, or leave it out with "
            "--on-bad-image skip."
        )


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"the disk of '{folder}' is full: free some space and repeat the command; finished shards are kept."
            ) from error
        raise DataError(f"'{folder}' cannot be written: {error.strerror or error}.") from error


@contextmanager
def _reporter(
    progress: bool | Progress, console: Console | None, name: str, total: int, done: int
) -> Iterator[Progress]:
    if callable(progress):
        yield progress
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, disable=not progress) as bar:
        task = bar.add_task(f"preparing {name}", total=total, completed=done)
        yield lambda finished, _: bar.update(task, completed=finished)
