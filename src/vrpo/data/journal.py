"""What an unfinished preparation has done so far: a line for each finished shard, in a file for each process."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from vrpo.data.manifest import (
    BadImage,
    Count,
    Finite,
    LatentRecord,
    Manifest,
    Positive,
    Preprocessing,
    Record,
    ShardRecord,
    SourceRecord,
    format_version,
)
from vrpo.data.shards import write_atomically
from vrpo.errors import DataError
from vrpo.files import is_unfinished
from vrpo.untrusted import parse_json

JOURNAL = "progress.jsonl"


class Request(Record):
    """What must be equal for a call to continue, or to find done, what an earlier call began."""

    version: int
    source: SourceRecord
    preprocessing: Preprocessing
    latents: LatentRecord | None = None
    rows_per_shard: Positive

    @staticmethod
    def of(manifest: Manifest) -> Request:
        """Return the request that a finished data set answers."""
        return Request(
            version=format_version(manifest.latents),
            source=manifest.source,
            preprocessing=manifest.preprocessing,
            latents=manifest.latents,
            rows_per_shard=manifest.rows_per_shard,
        )

    def refuse_other(self, folder: Path, other: Request) -> None:
        """Raise DataError if ``other``, which ``folder`` holds, is not this."""
        if self._comparable() == other._comparable():
            return
        if (self.source.name, self.source.kind) != (other.source.name, other.source.kind):
            held = f"data from '{other.source.name}', not '{self.source.name}'"
        elif self.source != other.source:
            held = f"data from '{other.source.name}' before its files changed"
        elif self.preprocessing != other.preprocessing:
            held = _difference(self.preprocessing, other.preprocessing)
        elif (self.latents is None) != (other.latents is None):
            held = "pixels alone, not latents" if other.latents is None else "latents, not pixels alone"
        elif self._comparable().latents != other._comparable().latents:
            assert self.latents is not None
            assert other.latents is not None
            if self.latents.weights != other.latents.weights:
                held = f"latents of the autoencoder '{other.latents.autoencoder}', not '{self.latents.autoencoder}'"
            else:
                held = _difference(self.latents, other.latents)
        else:
            held = f"shards of {other.rows_per_shard} images, not {self.rows_per_shard}"
        raise DataError(f"'{folder}' holds {held}: choose another folder, or delete this one.")

    def _comparable(self) -> Request:
        """Return the same without where the autoencoder was loaded from, which may move."""
        if self.latents is None or self.latents.weights is None:
            return self
        return self.model_copy(update={"latents": self.latents.model_copy(update={"autoencoder": None})})


def _difference(mine: Record, theirs: Record) -> str:
    own, held = mine.model_dump(), theirs.model_dump()
    name = next(name for name in own if own[name] != held[name])
    return f"data prepared with {name} {held[name]}, not {own[name]}"


class Moments(Record):
    """Sums over a shard's latents, by channel: of the mean, and of its square plus the variance."""

    first: tuple[Finite, ...]
    second: tuple[Finite, ...]


class Finished(Record):
    """A line of the journal: what became of the entries of one shard, None where none was readable."""

    index: Count
    shard: ShardRecord | None
    bad: tuple[BadImage, ...]
    upscaled: tuple[str, ...]
    upscaled_count: Count
    class_counts: tuple[Count, ...]
    moments: Moments | None = None


def begin_journal(folder: Path, request: Request) -> dict[int, Finished]:
    """Make the folder and its journal ready, and return the shards that an interrupted call finished, by index."""
    if not (folder / JOURNAL).exists():
        folder.mkdir(parents=True, exist_ok=True)
        others = sorted(child.name for child in folder.iterdir() if not is_unfinished(child))
        if others:
            raise DataError(
                f"'{folder}' is not empty and holds no prepared data set (such as '{others[0]}'): "
                "choose an empty or new folder."
            )
    finished = read_journals(folder, request)
    for leftover in filter(is_unfinished, folder.iterdir()):
        leftover.unlink()
    text = "".join(record.model_dump_json() + "\n" for record in (request, *finished.values()))
    write_atomically(folder / JOURNAL, [text.encode()])
    for file in _journals(folder):
        if file.name != JOURNAL:
            file.unlink()
    return finished


def read_journals(folder: Path, request: Request) -> dict[int, Finished]:
    """Return what all processes have finished, by index, of shards that are there in full.

    Raises DataError where a journal is damaged or of another request.
    """
    finished: dict[int, Finished] = {}
    for file in _journals(folder):
        header, *lines = file.read_bytes().split(b"\n")
        try:
            version = parse_json(header)["version"]
            begun = Request.model_validate_json(header) if version in (1, request.version) else None
        except (ValueError, KeyError, TypeError) as error:  # a ValidationError is a ValueError
            raise DataError(f"'{file}' is damaged: delete '{folder}' and prepare the source again.") from error
        if begun is None:
            raise DataError(f"'{folder}' was begun in format {version} of another vrpo: choose another folder.")
        request.refuse_other(folder, begun)
        for line in lines:
            try:
                entry = Finished.model_validate_json(line)
            except ValidationError:
                break  # a line cut off by a crash: its shard is made again
            if entry.shard is not None:
                shard = folder / entry.shard.file
                if not shard.exists() or shard.stat().st_size != entry.shard.bytes:
                    continue
            finished[entry.index] = entry
    return dict(sorted(finished.items()))


def append(folder: Path, rank: int, request: Request, finished: Finished) -> None:
    """Note a finished shard in the journal of process ``rank``."""
    file = folder / (JOURNAL if rank == 0 else f"progress-{rank}.jsonl")
    lines = [finished] if file.exists() else [request, finished]
    with open(file, "ab") as stream:
        stream.write("".join(line.model_dump_json() + "\n" for line in lines).encode())
        stream.flush()
        os.fsync(stream.fileno())


def remove_journals(folder: Path) -> None:
    """Delete the journals of a finished data set."""
    for file in _journals(folder):
        file.unlink(missing_ok=True)


def _journals(folder: Path) -> list[Path]:
    return sorted(folder.glob("progress*.jsonl"))


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Tell errors of the file system in one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"the disk of '{folder}' is full: free some space and repeat the command; finished shards are kept."
            ) from error
        raise DataError(f"'{folder}' cannot be written: {error.strerror or error}.") from error
