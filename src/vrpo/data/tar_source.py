"""Tar archives of images: WebDataset shards, labelled by a file beside each image, or class folders as in a zip."""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from vrpo.data.parts import consecutive, part_of, refuse_missing, refuse_several_sets
from vrpo.data.sources import (
    IMAGE_SUFFIXES,
    Entry,
    ListedFile,
    Source,
    arrange,
    hidden,
    printable_name,
    unsafe_name,
    walk,
)
from vrpo.errors import DataError
from vrpo.untrusted import parse_json

_LABEL_BYTES = 1 << 20
_HEADER_BYTES = 1 << 20
_JSON_NAMES = ("label", "cls", "class", "class_id")
_MOST_CLASSES = 10_000_000


def is_tar_source(path: Path) -> bool:
    """Whether a path is a tar archive or a folder that holds some at its top."""
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


class _Label(NamedTuple):
    """A class, and the file that says it."""

    value: int | str
    file: str

    @property
    def of_json(self) -> bool:
        return self.file.lower().endswith(".json")


@dataclass
class _Listing:
    """What archives hold; ``described`` are the keys of JSON files that say no class."""

    images: dict[str, ListedFile] = field(default_factory=dict)
    labels: dict[str, _Label] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    described: set[str] = field(default_factory=set)


def open_tar(path: Path) -> Source:
    """List the images of a tar archive, or of all those in a folder.

    A number in ``KEY.cls``, or else ``label`` in ``KEY.json``, is the class of the image ``KEY.jpg``, where a key is a
    name up to its first dot. Without any such file, folders are classes. Several archives of one folder each are a
    class each, as ImageNet's are, unless their names are a running number, as of shards. Raises DataError where an
    image and its label do not find each other, where archives are of several sets, or where one of a set is missing.
    """
    paths = [path] if path.is_file() else _shards(path)
    listing = _Listing()
    for number, shard in enumerate(paths):
        prefix = f"{shard.stem}/" if len(paths) > 1 else ""
        _list_shard(shard, number, prefix, listing)
    if path.is_dir():
        _look_beside(path, listing)
    files, opener = list(listing.images.values()), TarOpener(paths)
    are_shards = _are_shards(path, paths, listing)
    if not listing.labels:
        return arrange("tar", path, files, listing.ignored, opener, depth=int(are_shards))
    keyed: dict[str, ListedFile] = {}
    for file in files:
        key = _key(file.key)
        if key in keyed:
            raise DataError(f"'{path}' has two images of the key '{key}': pack it again with each key once.")
        if key not in listing.labels:
            raise DataError(
                f"'{path}' has an image '{file.key}' without a label '{key}.cls' or '.json', which others have: pack "
                "them together."
            )
        keyed[key] = file
    for key, label in listing.labels.items():
        if key not in keyed:
            raise DataError(f"'{path}' has a label '{label.file}' without an image '{key}': pack them together.")
    names, numbers = _classes(path, listing.labels)
    ordered = sorted(keyed, key=str.encode)
    entries = [keyed[key].entry(numbers[key]) for key in ordered]
    return Source("tar", path, names, entries, listing.ignored.total(), opener)


def _are_shards(path: Path, paths: Sequence[Path], listing: _Listing) -> bool:
    """Whether several archives, each the first folder of its files' keys, are parts of one set and not classes.

    Raises DataError where they are of several sets, or where one of a set is missing.
    """
    parts = [part_of(file) for file in paths]
    if path.is_dir() and any(part.total is not None for part in parts):
        refuse_several_sets(path, parts)
        refuse_missing(path, parts)
    if len(paths) == 1:
        return False
    parents: dict[str, set[str]] = {}
    for file in listing.images.values():
        archive, _, name = file.key.partition("/")
        parents.setdefault(archive, set()).add(name.rpartition("/")[0])
    labelled, folders = bool(listing.labels), max(map(len, parents.values()), default=0) > 1
    keyed = labelled or any(_key(name) in listing.described for name in listing.images)
    splits = all(part.of_split for part in parts)
    if labelled or splits or ((folders or keyed) and any(part.number is not None for part in parts)):
        refuse_several_sets(path, parts)
        refuse_missing(path, parts)
        return True
    return folders or consecutive(parts)


def _shards(folder: Path) -> list[Path]:
    return sorted((file for file in folder.iterdir() if file.suffix.lower() == ".tar"), key=lambda file: file.name)


def _look_beside(folder: Path, listing: _Listing) -> None:
    """Count the files beside a folder's archives; raises DataError for images, which would be left out."""
    for name, _ in walk(folder):
        suffix = os.path.splitext(name)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            raise DataError(
                f"'{folder}' has images beside its tar archives (such as '{printable_name(name)}'): give each a folder "
                "of its own."
            )
        if suffix != ".tar" or os.sep in name:
            listing.ignored[suffix] += 1


def _key(name: str) -> str:
    """Return the name up to the first dot after its folder."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


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
        key, suffix = prefix + _key(name), name.rpartition("/")[2].partition(".")[2].lower()
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
            if prefix + name in listing.images:
                raise DataError(f"'{path}' has two members named '{name}': pack it again with each name once.")
            place = (number, member.offset_data)
            listing.images[prefix + name] = ListedFile(prefix + name, member.size, place, member.chksum)
            continue
        label = _read_label(path, name, suffix, member, stream) if suffix in ("cls", "json") else None
        if label is None:
            listing.ignored[f".{suffix}"] += 1
            if suffix == "json":
                listing.described.add(key)
        else:
            _add_label(path, key, _Label(label, name), listing.labels)


def _add_label(path: Path, key: str, label: _Label, labels: dict[str, _Label]) -> None:
    """Keep one label of a key: of a ``.cls`` and a ``.json`` the first; raises DataError where they differ."""
    held = labels.setdefault(key, label)
    if held is label:
        return
    if held.of_json == label.of_json:
        raise DataError(f"'{path}' has two labels of the key '{key}': pack it again with each key once.")
    if isinstance(held.value, int) and isinstance(label.value, int) and held.value != label.value:
        raise DataError(
            f"'{held.file}' and '{label.file}' of '{path}' hold different classes ({held.value} and {label.value}): "
            "pack it again with one of them."
        )
    if held.of_json:
        labels[key] = label


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


def _read_label(path: Path, name: str, suffix: str, member: tarfile.TarInfo, stream: BinaryIO) -> int | str | None:
    """Return the class in a ``.cls`` or ``.json`` file; None where JSON is of something else."""
    if suffix == "json" and member.size > _LABEL_BYTES:
        return None
    here = stream.tell()
    stream.seek(member.offset_data)
    text = stream.read(min(member.size, _LABEL_BYTES))
    stream.seek(here)
    try:
        if suffix == "cls":
            return int(text)
        content = parse_json(text)
        told = content if isinstance(content, dict) else {}
        label = next((told[key] for key in _JSON_NAMES if told.get(key) is not None), None)
        if isinstance(label, str):
            return printable_name(label)
        if label is None or type(label) is int:
            return label
        raise ValueError("it is neither a number nor a name")
    except ValueError as error:
        wanted = "a whole number" if suffix == "cls" else f"a number or name under '{_JSON_NAMES[0]}'"
        raise DataError(f"'{name}' of '{path}' holds no class: it should hold {wanted}.") from error


def _classes(path: Path, labels: dict[str, _Label]) -> tuple[tuple[str, ...], dict[str, int]]:
    if all(isinstance(label.value, str) for label in labels.values()):
        names = sorted({cast(str, label.value) for label in labels.values()}, key=str.encode)
        place = {name: number for number, name in enumerate(names)}
        return tuple(names), {key: place[cast(str, label.value)] for key, label in labels.items()}
    for key, label in labels.items():
        if not isinstance(label.value, int) or not 0 <= label.value < _MOST_CLASSES:
            raise DataError(f"the label {label.value!r} of '{key}' in '{path}' is no class number like the others.")
    numbers = {key: cast(int, label.value) for key, label in labels.items()}
    return tuple(map(str, range(max(numbers.values()) + 1))), numbers
