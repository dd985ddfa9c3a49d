"""From a source of images to shards: parallel, in deterministic order, and resumable at shard boundaries.

Shard s holds the readable images among entries s R .. (s + 1) R - 1 of the source, so its bytes depend
neither on the number of workers or processes nor on where an earlier run was interrupted. Finished shards are noted
in a journal, which gives way to the manifest when the last one is written. Of several processes, number r makes the
shards s with s mod W = r. A shard that a finished data set has lost is made again, to the bytes it had.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vrpo.data.journal import (
    Finished,
    Request,
    append,
    begin_journal,
    disk_errors,
    read_journals,
    remove_journals,
    remove_unfinished,
)
from vrpo.data.latents import LatentOptions, LatentPlan, moments, plan_latents, rows_of
from vrpo.data.manifest import (
    MANIFEST,
    BadImage,
    Counts,
    Manifest,
    Normaliser,
    Preprocessing,
    ShardRecord,
    SourceRecord,
    fingerprint,
    format_version,
    read_manifest,
)
from vrpo.data.progress import Progress, Reporting
from vrpo.data.shards import Rows, ShardedDataset, write_atomically, write_shard
from vrpo.data.sources import Entry, Source, open_source
from vrpo.data.transforms import MAX_PIXELS
from vrpo.data.workers import Decoded, decode_in_order, worker_count
from vrpo.errors import ConfigError, DataError
from vrpo.processes import ALONE, World
from vrpo.wording import counted

if TYPE_CHECKING:
    from rich.console import Console

SHARD_BYTES = 256 << 20
# One image of this side is 48 MiB of pixels, of which a worker, a shard and a batch can still hold some.
MAX_SIZE = 4096

_TASK_IMAGES = 256
_TASK_BYTES = 16 << 20
_NAMED_UPSCALED = 1000


@dataclass(frozen=True)
class PrepareResult:
    """What ``prepare`` did: the folder and its manifest, the time it took, and what was there already.

    ``images_decoded`` counts those of all processes that worked together.
    """

    path: Path
    manifest: Manifest
    seconds: float
    images_decoded: int
    resumed_shards: int
    already_complete: bool
    remade_shards: int = 0

    def summary(self) -> str:
        """Say in one line what the folder holds, and in further lines what was left out or scaled up."""
        counts, size = self.manifest.counts, self.manifest.preprocessing.size
        if self.already_complete and self.remade_shards:
            s = "" if self.remade_shards == 1 else "s"
            lines = [f"'{self.path}' had lost {self.remade_shards} shard{s}, made again to the same bytes."]
        elif self.already_complete:
            lines = [f"'{self.path}' already holds this data set ({counts.images:,} images): nothing to do."]
        else:
            classes = len(self.manifest.class_names)
            labels = counted(classes, "class", "classes") if classes else "no labels"
            rate = self.images_decoded / max(self.seconds, 1e-9)
            latents = self.manifest.latents
            grid = "" if latents is None else f" as latents {latents.channels} x {latents.size} x {latents.size}"
            lines = [
                f"{counted(counts.images, 'image', 'images')} of {size} x {size}{grid} ({labels}) in '{self.path}', "
                f"{self.seconds:.1f} s, {rate:,.0f} images/s."
            ]
        if self.resumed_shards:
            lines.append(f"{self.resumed_shards} finished shards of an earlier run were kept.")
        if self.manifest.bad:
            first = self.manifest.bad[0]
            lines.append(f"{counts.bad:,} could not be read (all listed in {MANIFEST}): '{first.key}': {first.reason}.")
        latents = self.manifest.latents
        if latents is not None and latents.weights is None:
            taken = f"taken to be '{latents.autoencoder}'" if latents.autoencoder else "not known"
            comparable = latents.autoencoder is None or (latents.posterior and latents.pixels)
            more = ": to say it, prepare with --latents." if comparable else ", and they were not compared with it."
            lines.append(f"Which autoencoder made the latents is {taken}{more}")
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
    latents: LatentOptions | None = None,
    on_bad_image: Literal["skip", "fail"] = "skip",
    workers: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    max_pixels: int = MAX_PIXELS,
    progress: bool | Progress = True,
    console: Console | None = None,
    world: World = ALONE,
) -> PrepareResult:
    """Write every image of ``source`` as uint8 (3, size, size), as latents, or as both, to shards in folder ``out``.

    A shard holds at most ``shard_bytes`` of rows. ``flip`` tells readers to mirror at random; latents of mirror images
    are then stored too. ``workers`` processes decode (default: one per core; 1 decodes in this process). ``progress``
    is a bar on ``console``, or a function of images done and in all. An interrupted call is continued by the same
    call; a finished one makes shards again that are missing or cut, and otherwise does nothing. The processes of
    ``world``, all of which make the same call, share the shards, and those of a machine its cores; each tells the
    progress of its own part, the first one alone by a bar.

    Raises DataError where the source holds nothing readable, where ``out`` holds anything else, at the first
    unreadable image with ``on_bad_image="fail"``, and where the disk is full; finished shards stay valid. Raises
    ConfigError and CheckpointError for an autoencoder that cannot be used.
    """
    started = time.perf_counter()
    with world.agreed():
        for option, value in (("--size", size), ("--max-pixels", max_pixels), ("--shard-mb", shard_bytes)):
            if value < 1:
                raise ConfigError(f"{option} cannot be {value}: it must be at least 1.")
        if size > MAX_SIZE:
            raise ConfigError(f"--size {size} is more than can be prepared: give at most {MAX_SIZE:,} pixels.")
        opened = source if isinstance(source, Source) else open_source(source)
        folder = Path(out).expanduser()
        if opened.path.is_dir() and folder.resolve().is_relative_to(opened.path):
            raise DataError(f"'{folder}' lies inside the source '{opened.path}': choose a folder outside it.")
        plan = plan_latents(opened, latents or LatentOptions(), size=size, flip=flip, max_pixels=max_pixels)
        request = Request(
            version=format_version(plan.record),
            source=SourceRecord(name=opened.name, kind=opened.kind, listing=_listing(opened)),
            preprocessing=Preprocessing(size=size, flip="random" if flip else "none", max_pixels=max_pixels),
            latents=plan.record,
            rows_per_shard=max(1, shard_bytes // plan.row_bytes),
        )
    job = _Job(opened, folder, request, plan, world, on_bad_image, workers, Reporting(progress, console))
    finished = world.ask_first((folder / MANIFEST).exists)
    return _complete(job, started) if finished else _prepare(job, started)


@dataclass(frozen=True)
class _Job:
    """What a process is to prepare, from what, where to, and how."""

    source: Source
    folder: Path
    request: Request
    plan: LatentPlan
    world: World
    on_bad_image: str
    workers: int | None
    reporting: Reporting

    def entries(self, shard: int) -> Sequence[Entry]:
        """Return the entries that shard ``shard`` is made of."""
        rows = self.request.rows_per_shard
        return self.source.entries[shard * rows : (shard + 1) * rows]

    def own(self, shards: Iterable[int]) -> list[int]:
        """Return those of ``shards`` that this process makes."""
        return [shard for shard in shards if shard % self.world.size == self.world.rank]

    def count(self, shards: Iterable[int]) -> int:
        """Return how many images ``shards`` are made of."""
        return sum(len(self.entries(shard)) for shard in shards)


def _prepare(job: _Job, started: float) -> PrepareResult:
    folder, request, world = job.folder, job.request, job.world

    def begin() -> None:
        with disk_errors(folder):
            begin_journal(folder, request)

    world.ask_first(begin)
    with world.agreed():
        with disk_errors(folder):
            finished = read_journals(folder, request)
        for earlier in finished.values():
            _refuse_bad(earlier.bad, job.on_bad_image)
    total, resumed = len(job.source.entries), len(finished)
    missing = [shard for shard in range(-(-total // request.rows_per_shard)) if shard not in finished]
    mine, remaining = job.own(missing), job.count(missing)
    done, share = (total - remaining, total) if world.size == 1 else (0, job.count(mine))
    made: dict[int, Finished] = {}
    with world.agreed(), closing(_made(job, mine, done, share)) as shards:
        for index, shard in shards:
            with disk_errors(folder):
                made[index] = shard.write(folder, index)
                append(folder, world.rank, request, made[index])
    for part in world.gather(made):
        finished |= part

    def end() -> None:
        manifest = _manifest(job.source, request, job.plan, [finished[index] for index in sorted(finished)])
        with disk_errors(folder):
            write_atomically(folder / MANIFEST, [manifest.to_json().encode()])
            remove_journals(folder)

    world.ask_first(end)
    with world.agreed(), disk_errors(folder):
        manifest = ShardedDataset(folder).manifest
    return PrepareResult(folder, manifest, time.perf_counter() - started, remaining, resumed, False)


def _made(job: _Job, shards: Sequence[int], done: int, share: int) -> Generator[tuple[int, _Shard]]:
    """Decode the images of ``shards`` and yield each with its rows; ``done`` of ``share`` images are there already."""
    plan, parts = job.plan, [job.entries(shard) for shard in shards]
    tasks = [(shard, task) for shard, part in zip(shards, parts, strict=True) for task in _tasks(part, plan.task_bytes)]
    workers = worker_count(job.workers, [entry for part in parts for entry in part], job.world.local_size)
    decoded = decode_in_order(job.source.opener, [task for _, task in tasks], plan.work, workers)
    with job.reporting.begin(job.source.name, share, done, job.world) as report, closing(decoded):
        shard = _Shard(len(job.source.class_names), plan)
        for (index, task), result in zip(tasks, decoded, strict=True):
            job.world.stop_if_failed()
            shard.add(task, result)
            _refuse_bad(shard.bad, job.on_bad_image)
            done += len(task)
            if shard.entries == len(job.entries(index)):
                yield index, shard
                shard = _Shard(len(job.source.class_names), plan)
            report(done, share)


def _complete(job: _Job, started: float) -> PrepareResult:
    """See that a finished data set is the one asked for, and all there."""
    folder, world = job.folder, job.world
    with world.agreed():
        manifest = read_manifest(folder)
        job.request.refuse_other(folder, Request.of(manifest))
        _refuse_bad(manifest.bad, job.on_bad_image)

    def find() -> dict[int, ShardRecord]:
        remove_journals(folder)
        lost = _lost_shards(folder, manifest)
        if lost:
            with disk_errors(folder):
                remove_unfinished(folder)
        return lost

    lost = world.ask_first(find)
    if lost:
        _make_again(job, lost)
    with world.agreed():
        manifest = ShardedDataset(folder).manifest
    return PrepareResult(folder, manifest, time.perf_counter() - started, job.count(lost), 0, True, len(lost))


def _make_again(job: _Job, lost: dict[int, ShardRecord]) -> None:
    """Make lost shards again.

    Raises DataError for one whose bytes are not what they were.
    """
    mine = job.own(lost)
    with job.world.agreed(), closing(_made(job, mine, 0, job.count(mine))) as shards:
        for index, shard in shards:
            with disk_errors(job.folder):
                made = shard.write(job.folder, index).shard
            if made != lost[index]:
                (job.folder / lost[index].file).unlink(missing_ok=True)
                raise DataError(
                    f"'{job.folder / lost[index].file}' was lost, and making it again gives other bytes than before, "
                    "as another device or library does: prepare the source into another folder."
                )


def _lost_shards(folder: Path, manifest: Manifest) -> dict[int, ShardRecord]:
    """Return the shards of a finished data set that are not there in full, by index."""
    found = {}
    for record in manifest.shards:
        file = folder / record.file
        if not file.is_file() or file.stat().st_size != record.bytes:
            found[record.index] = record
    return found


class _Shard:
    """The rows of the shard being decoded."""

    def __init__(self, num_classes: int, plan: LatentPlan) -> None:
        self.class_counts = [0] * num_classes
        self.plan = plan
        self.entries = 0
        self.blocks: list[Rows] = []
        self.kept: list[Entry] = []
        self.bad: list[BadImage] = []
        self.upscaled: list[str] = []

    def add(self, entries: Sequence[Entry], result: Decoded) -> None:
        self.entries += len(entries)
        if result.kept:
            self.blocks.append(rows_of(result, self.plan.maker, self.plan.keep_pixels))
        self.kept += [entries[i] for i in result.kept]
        self.bad += [BadImage(key=entries[i].key, reason=reason) for i, reason in result.bad]
        self.upscaled += [entries[i].key for i in result.upscaled]

    def write(self, folder: Path, index: int) -> Finished:
        labels = [entry.label for entry in self.kept if entry.label is not None]
        for label in labels:
            self.class_counts[label] += 1
        keys = [entry.key for entry in self.kept]
        record = None
        if keys:
            record = write_shard(folder, index, self.blocks, labels if self.class_counts else None, keys)
        latents = self.plan.record
        return Finished(
            index=index,
            shard=record,
            bad=tuple(self.bad),
            upscaled=tuple(self.upscaled[:_NAMED_UPSCALED]),
            upscaled_count=len(self.upscaled),
            class_counts=tuple(self.class_counts),
            moments=None if latents is None or not keys else moments(self.blocks, latents.posterior),
        )


def _tasks(entries: Sequence[Entry], image_bytes: int) -> Iterator[list[Entry]]:
    """Cut the entries of a shard into tasks of bounded size."""
    step = max(1, min(_TASK_IMAGES, _TASK_BYTES // image_bytes))
    for start in range(0, len(entries), step):
        yield list(entries[start : start + step])


def _listing(source: Source) -> str:
    """Hash the source's keys, labels, sizes and checksums, to notice when its files change."""
    digest = hashlib.sha256()
    for entry in source.entries:
        digest.update(f"{entry.key}\0{entry.label}\0{entry.size}\0{entry.checksum}\n".encode())
    return digest.hexdigest()


def _manifest(source: Source, request: Request, plan: LatentPlan, finished: list[Finished]) -> Manifest:
    shards = tuple(entry.shard for entry in finished if entry.shard is not None)
    bad = tuple(image for entry in finished for image in entry.bad)
    if not shards:
        raise DataError(
            f"none of the {len(bad):,} images in '{source.path}' can be read, "
            f"the first being '{bad[0].key}': {bad[0].reason}."
        )
    normaliser: Normaliser | None = plan.normaliser(finished)
    return Manifest(
        version=request.version,
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
        latents=request.latents,
        normaliser=normaliser,
        rows_per_shard=request.rows_per_shard,
        shards=shards,
        bad=bad,
        upscaled=tuple(key for entry in finished for key in entry.upscaled)[:_NAMED_UPSCALED],
        fingerprint=fingerprint(request.preprocessing, shards, request.latents, normaliser),
    )


def _refuse_bad(bad: Sequence[BadImage], on_bad_image: str) -> None:
    if on_bad_image == "fail" and bad:
        raise DataError(
            f"'{bad[0].key}' cannot be used: {bad[0].reason}; repair or remove it, or leave it out with "
            "--on-bad-image skip."
        )
