"""Tar archives of images: WebDataset shards, labelled by a file beside each image, or class folders as in a zip."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from vrpo.data.sources import IMAGE_SUFFIXES, Entry, ListedFile, Source, arrange, hidden, printable_name, unsafe_name
from vrpo.errors import DataError
from vrpo.untrusted import parse_json

_LABEL_BYTES = 1 << 20
_HEADER_BYTES = 1 << 20
_JSON_NAMES = ("label", "cls", "class", "class_id")
_MOST_CLASSES = 10_000_000


def is_tar_source(path: Path) -> bool:
    """Whether a path is a tar archive or a folder of tar archives and nothing else that could be images."""
    return path.suffix.lower() == ".tar" if path.is_file() else path.is_dir() and bool(_shards(path))


@dataclass
class TarOpener:
    """Reads members of tar archives in place, one open archive a process."""

    paths: Sequence[Path]

    def __post_init__(self) -> None:
        self._open: tuple[int, BinaryIO] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"paths": self.paths, "_open": None}

    def connect(self) -> None:
        """Check that the first archive is still there."""
        os.stat(self.paths[0])

    def open(self, entry: Entry) -> BinaryIO:
        """Return one member's content."""
        shard, offset = cast("tuple[int, int]", entry.location)
        if self._open is None or self._open[0] != shard:
            if self._open is not None:
                self._open[1].close()
            self._open = (shard, self.paths[shard].open("rb"))
        stream = self._open[1]
        stream.seek(offset)
        return io.BytesIO(stream.read(entry.size))


@dataclass
class _Sample:
    """The files of one key of a shard."""

    image: ListedFile | None = None
    label: int | str | None = None
    label_file: str | None = None


@dataclass
class _Listing:
    samples: dict[str, _Sample] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)


def open_tar(path: Path) -> Source:
    """List the images of a tar archive, or of all those in a folder.

    A file's key is its name up to the first dot. A number in ``KEY.cls``, or ``label`` in ``KEY.json``, is its class;
    without any such file, folders are classes. Several archives of one folder each are a class each, as ImageNet's are,
    unless their names are a running number, as of shards. Raises DataError where an image and its label do not find
    each other.
    """
    paths = [path] if path.is_file() else _shards(path)
    listing = _Listing()
    for number, shard in enumerate(paths):
        prefix = f"{shard.stem}/" if len(paths) > 1 else ""
        _list_shard(shard, number, prefix, listing)
    samples, opener = listing.samples, TarOpener(paths)
    files = [sample.image for sample in samples.values() if sample.image is not None]
    if not any(sample.label_file for sample in samples.values()):
        return arrange("tar", path, files, listing.ignored, opener, depth=int(_are_shards(paths, files)))
    for key, sample in samples.items():
        if sample.image is None:
            raise DataError(f"'{path}' has a label '{sample.label_file}' without an image '{key}': pack them together.")
        if sample.label_file is None:
            raise DataError(
                f"'{path}' has an image '{sample.image.key}' without a label '{key}.cls' or '.json', which others "
                "have: pack them together."
            )
    names, numbers = _classes(path, samples)
    ordered = sorted(samples, key=str.encode)
    entries = [cast(ListedFile, samples[key].image).entry(numbers[key]) for key in ordered]
    return Source("tar", path, names, entries, listing.ignored.total(), opener)


def _are_shards(paths: Sequence[Path], files: Sequence[ListedFile]) -> bool:
    """Whether several archives, each the first folder of its files' keys, are parts of one set and not classes."""
    if len(paths) == 1:
        return False
    parents: dict[str, set[str]] = {}
    for file in files:
        archive, _, name = file.key.partition("/")
        parents.setdefault(archive, set()).add(name.rpartition("/")[0])
    if max(map(len, parents.values()), default=0) > 1:
        return True
    told = [re.fullmatch(r"(.*?)(\d+)(\D*)", file.stem) for file in paths]
    numbers = sorted(int(name[2]) for name in told if name is not None)
    around = {(name[1], name[3]) for name in told if name is not None}
    return len(around) == 1 and numbers == list(range(numbers[0], numbers[0] + len(paths)))


def _shards(folder: Path) -> list[Path]:
    return sorted((file for file in folder.iterdir() if file.suffix.lower() == ".tar"), key=lambda file: file.name)


def _list_shard(path: Path, number: int, prefix: str, listing: _Listing) -> None:
    for member, stream in _members(path):
        name = printable_name(member.name.removeprefix("./"))
        reason = unsafe_name(name)
        if reason is None and (member.issym() or member.islnk()):
            reason = "a link"
        if reason is None and member.issparse():
            reason = "a sparse file"
        if reason is not None:
            raise DataError(f"'{path}' has a member that is {reason} ('{name}'): pack it again with plain files only.")
        if not member.isfile() or any(map(hidden, name.split("/"))):
            continue
        folder, _, base = name.rpartition("/")
        stem, _, suffix = base.partition(".")
        key = prefix + (f"{folder}/{stem}" if folder else stem)
        suffix = suffix.lower()
        sample = listing.samples.get(key) or _Sample()
        if os.path.splitext(base)[1].lower() in IMAGE_SUFFIXES:
            if sample.image is not None:
                raise DataError(f"'{path}' has two images of the key '{key}': pack it again with each key once.")
            file = ListedFile(prefix + name, member.size, (number, member.offset_data), member.chksum)
            sample.image = file
        elif suffix in ("cls", "json"):
            if sample.label_file is not None:
                raise DataError(f"'{path}' has two labels of the key '{key}': pack it again with each key once.")
            sample.label, sample.label_file = _read_label(path, name, suffix, member, stream), name
        else:
            listing.ignored[f".{suffix}"] += 1
            continue
        listing.samples[key] = sample


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, BinaryIO]]:
    """Yield the members of an archive; one that is cut off or compressed is refused."""
    try:
        with ExitStack() as stack:
            stream = stack.enter_context(open(path, "rb"))
            headers = _Headers(stream)
            archive = stack.enter_context(tarfile.open(fileobj=headers, mode="r:"))  # type: ignore[call-overload]
            end = 0
            for member in archive:
                end = archive.offset
                if end < member.offset_data:
                    raise tarfile.ReadError("a member has less than no content")
                yield member, stream
                headers.begin()
            stream.seek(end)
            if stream.read(512).strip(b"\0") or stream.tell() < end + 512:
                raise tarfile.ReadError("it has no end mark")
    except (tarfile.TarError, ValueError, RecursionError) as error:  # a header may hold anything
        said = "its headers are nested" if isinstance(error, RecursionError) else error
        raise DataError(
            f"'{path}' is a damaged, incomplete or compressed tar archive ({said}): fetch it again, or unpack it."
        ) from error


class _Headers:
    """The file of an archive, of which the headers of one member may take ``_HEADER_BYTES`` and lie within it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._end = stream, os.fstat(stream.fileno()).st_size
        self.tell = stream.tell
        self.begin()

    def begin(self) -> None:
        """Go on to another member."""
        self._left = _HEADER_BYTES

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self._left:
            raise tarfile.ReadError("a header is too large")
        self._left -= size
        return self._stream.read(size)

    def seek(self, position: int) -> int:
        if not 0 <= position <= self._end:
            raise tarfile.ReadError("a member lies beyond its end")
        return self._stream.seek(position)


def _read_label(path: Path, name: str, suffix: str, member: tarfile.TarInfo, stream: BinaryIO) -> int | str:
    """Return the class in a ``.cls`` or ``.json`` file."""
    here = stream.tell()
    stream.seek(member.offset_data)
    text = stream.read(min(member.size, _LABEL_BYTES))
    stream.seek(here)
    try:
        if suffix == "cls":
            return int(text)
        content = parse_json(text)
        label = next(content[key] for key in _JSON_NAMES if key in content)
        if isinstance(label, str):
            return printable_name(label)
        if type(label) is int:
            return label
        raise ValueError("it is neither a number nor a name")
    except (ValueError, StopIteration, TypeError) as error:
        wanted = "a whole number" if suffix == "cls" else f"a number or name under '{_JSON_NAMES[0]}'"
        raise DataError(f"'{name}' of '{path}' holds no class: it should hold {wanted}.") from error


def _classes(path: Path, samples: dict[str, _Sample]) -> tuple[tuple[str, ...], dict[str, int]]:
    labels = {key: sample.label for key, sample in samples.items()}
    if all(isinstance(label, str) for label in labels.values()):
        names = sorted({cast(str, label) for label in labels.values()}, key=str.encode)
        place = {name: number for number, name in enumerate(names)}
        return tuple(names), {key: place[cast(str, label)] for key, label in labels.items()}
    for key, label in labels.items():
        if not isinstance(label, int) or not 0 <= label < _MOST_CLASSES:
            raise DataError(f"the label {label!r} of '{key}' in '{path}' is no class number like the others.")
    numbers = {key: cast(int, label) for key, label in labels.items()}
    return tuple(map(str, range(max(numbers.values()) + 1))), numbers
