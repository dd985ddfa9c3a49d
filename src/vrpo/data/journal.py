"""What an unfinished preparation has done so far: a line for each finished shard, in a file for each process.

Every line is sealed and says which request it is of, so a line that was cut or damaged is known, and only its shard is
made again.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
from vrpo.untrusted import SEAL, parse_json, seal, unseal

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

    @property
    def digest(self) -> str:
        """What tells this request from others."""
        return str(seal(self._comparable().model_dump(mode="json"))[SEAL])

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
    remove_unfinished(folder)
    write_atomically(folder / JOURNAL, [_header(request), *(_line(request, entry) for entry in finished.values())])
    for file in _journals(folder):
        if file.name != JOURNAL:
            file.unlink()
    return finished


def read_journals(folder: Path, request: Request) -> dict[int, Finished]:
    """Return what all processes have finished, by index, of shards that are there in full.

    Raises DataError where they are of another request, or where the journal is damaged and no line of it is whole.
    """
    finished: dict[int, Finished] = {}
    damaged: ValueError | None = None
    for file in _journals(folder):
        header, *lines = file.read_bytes().split(b"\n")
        try:
            _check_header(folder, header, request)
        except ValueError as error:
            # The first process writes its journal's head at once; another may have been cut off while it began its own.
            damaged = error if file.name == JOURNAL else damaged
        for line in lines:
            entry = _entry(line, request)
            if entry is None:
                continue
            if entry.shard is not None:
                shard = folder / entry.shard.file
                if not shard.exists() or shard.stat().st_size != entry.shard.bytes:
                    continue
            finished[entry.index] = entry
    if damaged is not None and not finished:
        sentence = f"'{folder / JOURNAL}' is damaged: delete '{folder}' and prepare the source again."
        raise DataError(sentence) from damaged
    return dict(sorted(finished.items()))


def _check_header(folder: Path, header: bytes, request: Request) -> None:
    """Raise ValueError if the first line of a journal is damaged, and DataError if it is of another request."""
    try:
        content = unseal(parse_json(header), required=False)
        version = content["version"]
        begun = Request.model_validate(content) if version in (1, request.version) else None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("it is no request") from error
    if begun is None:
        raise DataError(f"'{folder}' was begun in format {version} of another vrpo: choose another folder.")
    request.refuse_other(folder, begun)


def _entry(line: bytes, request: Request) -> Finished | None:
    """Return a finished shard, or None of a line that was cut off, damaged or written for another request."""
    try:
        content = unseal(parse_json(line))
        return Finished.model_validate(content) if content.pop("request") == request.digest else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _header(request: Request) -> bytes:
    return json.dumps(seal(request.model_dump(mode="json"))).encode() + b"\n"


def _line(request: Request, finished: Finished) -> bytes:
    content = finished.model_dump(mode="json") | {"request": request.digest}
    return json.dumps(seal(content)).encode() + b"\n"


def append(folder: Path, rank: int, request: Request, finished: Finished) -> None:
    """Note a finished shard in the journal of process ``rank``."""
    file = folder / (JOURNAL if rank == 0 else f"progress-{rank}.jsonl")
    header = b"" if file.exists() else _header(request)
    with open(file, "ab") as stream:
        stream.write(header + _line(request, finished))
        stream.flush()
        os.fsync(stream.fileno())


def remove_unfinished(folder: Path) -> None:
    """Delete what a process that was killed left half-written."""
    for leftover in filter(is_unfinished, folder.iterdir()):
        leftover.unlink(missing_ok=True)


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
        if folder.is_file():
            raise DataError(f"'{folder}' is a file: name a folder to write.") from error
        raise DataError(f"'{folder}' cannot be written: {error.strerror or error}.") from error
