"""Where images come from: folders, zip archives, arrays in memory and more, all in one deterministic order.

A source lists its images without decoding any. Its order is the byte-wise order of their keys, so that the
same files give the same data set on every machine. Another kind of source is one more row in ``_kinds``.
"""

from __future__ import annotations

import io
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from vrpo.data.parts import SPLIT_NAMES
from vrpo.errors import DataError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_COMPRESSED = frozenset({".bz2", ".gz", ".lz4", ".tbz2", ".tgz", ".txz", ".xz", ".zst"})


Location = str | int | tuple[int, ...] | tuple[str, str]
"""Where an opener finds an entry: a path, a number, places in files, or the paths of its parts."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a source: its key and class, its encoded size in bytes, and where the opener finds it.

    ``checksum`` is the CRC-32 of the content where the source has it at hand, otherwise 0.
    """

    key: str
    label: int | None
    size: int
    location: Location
    checksum: int = 0


class Opener(Protocol):
    """What a worker process needs to read a source's images: small, picklable, and connected on first use."""

    def connect(self) -> None:
        """Open the container, if there is one; raises OSError or DataError where the whole source is gone."""

    def open(self, entry: Entry) -> BinaryIO:
        """Return the encoded image as a binary stream."""


class LatentOpener(Opener, Protocol):
    """An opener of a source that brings latents."""

    def latents(self, entry: Entry) -> NDArray[np.float16]:
        """Return the latents of an entry, (views, C, h, w); raises DataError where they cannot be used."""


@dataclass(frozen=True)
class StoredLatents:
    """Latents that a source brings: each entry's are (views, C, h, w), the second view of the mirror image.

    With ``posterior`` the channels are those of the mean and of the standard deviation. ``shift`` and ``scale`` are the
    normaliser that belongs to them, by channel, where the source's layout says; ``autoencoder`` is the usual one.
    """

    shape: tuple[int, int, int, int]
    posterior: bool
    pixels: bool
    autoencoder: str | None = None
    shift: tuple[float, ...] | None = None
    scale: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Source:
    """The images of ``path`` in byte-wise order of their keys.

    ``class_names`` is empty where the images carry no labels; ``ignored`` counts files that are not images. ``title``
    is its name where the path does not tell it.
    """

    kind: str
    path: Path
    class_names: tuple[str, ...]
    entries: Sequence[Entry]
    ignored: int
    opener: Opener
    latents: StoredLatents | None = None
    title: str | None = None

    @property
    def name(self) -> str:
        """The title or the last part of the path: what a manifest may say about where the data came from."""
        return self.title or self.path.name

    def open(self, entry: Entry) -> BinaryIO:
        """Return the encoded image of ``entry`` as a binary stream."""
        self.opener.connect()
        return self.opener.open(entry)


class SourceKind(NamedTuple):
    """A row of the registry: which paths a kind of source takes, and how it lists them."""

    name: str
    accepts: Callable[[Path], bool]
    open: Callable[[Path], Source]


def open_source(path: str | os.PathLike[str]) -> Source:
    """List the images of a source: image folder, zip, tar, parquet, REPA's or LightningDiT's folder, or the hub.

    A name ``hf:OWNER/NAME`` is a data set of the Hugging Face hub. In a folder or zip, images lie either all at the top
    (unlabelled) or all in sub-folders (one class each, sorted by name, whatever lies deeper); folders that wrap
    everything are skipped. Hidden files and ``__MACOSX`` are passed over silently, files with other suffixes are
    counted. Raises DataError where there is nothing to read or the layout is ambiguous.
    """
    if os.fspath(path).startswith("hf:"):
        from vrpo.data.parquet_source import open_from_hub

        return open_from_hub(os.fspath(path))
    location = Path(path).expanduser()
    if not location.exists():
        raise DataError(f"there is no '{location}': name a folder or a zip archive of images.")
    location = location.resolve()
    for kind in _kinds():
        if kind.accepts(location):
            return kind.open(location)
    if location.suffix.lower() in _COMPRESSED:
        raise DataError(f"'{location}' is compressed, so that it cannot be read in place: unpack it.")
    raise DataError(
        f"'{location}' is not a source that can be read: give a folder or zip of images, tar or parquet files, or a "
        "folder of REPA or LightningDiT."
    )


def _kinds() -> tuple[SourceKind, ...]:
    """Return the kinds of sources in the order in which they are asked; the plain folder takes what others leave."""
    from vrpo.data import latent_folders, parquet_source, tar_source, zip_source

    return (
        SourceKind("REPA's folder", latent_folders.is_repa_folder, latent_folders.open_repa),
        SourceKind("LightningDiT's folder", latent_folders.is_latent_folder, latent_folders.open_latent_shards),
        SourceKind("tar", tar_source.is_tar_source, tar_source.open_tar),
        SourceKind("parquet", parquet_source.is_parquet_source, parquet_source.open_parquet),
        SourceKind("zip", zip_source.is_zip, zip_source.open_zip),
        SourceKind("folder", Path.is_dir, _open_folder),
    )


class ListedFile(NamedTuple):
    """A file of a source before its class is known."""

    key: str
    size: int
    location: Location
    checksum: int = 0

    def entry(self, label: int | None) -> Entry:
        return Entry(self.key, label, self.size, self.location, self.checksum)


@dataclass
class FolderOpener:
    """Opens images below a folder by their relative path."""

    root: Path

    def connect(self) -> None:
        """Check that the folder is still there."""
        os.stat(self.root)

    def open(self, entry: Entry) -> BinaryIO:
        """Open one file."""
        return open(os.path.join(self.root, str(entry.location)), "rb")


@dataclass
class ArrayOpener:
    """Serves rows of an array as uncompressed Netpbm images, so that arrays take the same way as files."""

    images: NDArray[np.uint8]

    def connect(self) -> None:
        """Nothing to open."""

    def open(self, entry: Entry) -> BinaryIO:
        """Return row ``entry.location`` as PGM (one channel) or PPM (three)."""
        image = self.images[cast(int, entry.location)]
        height, width, channels = image.shape
        magic = b"P5" if channels == 1 else b"P6"
        return io.BytesIO(b"%s %d %d 255\n" % (magic, width, height) + np.ascontiguousarray(image).tobytes())


def ArraySource(
    images: NDArray[np.uint8],
    labels: Sequence[int] | NDArray[np.integer] | None,
    class_names: Sequence[str],
    name: str,
) -> Source:
    """Return a source over images in memory: uint8 (N, H, W, 1 or 3), in the given order.

    Raises DataError for another type or shape, or for a label without a class name.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or len(images) == 0:
        raise DataError(
            f"the images of '{name}' are {images.dtype} {images.shape}: give uint8 (N, H, W, 1 or 3) with N > 0."
        )
    if labels is None:
        numbers: list[int | None] = [None] * len(images)
        class_names = ()
    else:
        numbers = [int(label) for label in labels]
        if len(numbers) != len(images) or not set(numbers) <= set(range(len(class_names))):
            raise DataError(f"the labels of '{name}' must be one of 0..{len(class_names) - 1} for every image.")
    width = len(str(len(images) - 1))
    entries = [
        Entry(f"{i:0{width}d}", label, image.nbytes, i, zlib.crc32(image.tobytes()))
        for i, (image, label) in enumerate(zip(images, numbers, strict=True))
    ]
    return Source("array", Path(name), tuple(class_names), entries, 0, ArrayOpener(images))


def _open_folder(path: Path) -> Source:
    files: list[ListedFile] = []
    ignored: Counter[str] = Counter()
    for relative, size in walk(path):
        suffix = os.path.splitext(relative)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            files.append(ListedFile(printable_name(relative.replace(os.sep, "/")), size, relative))
        else:
            ignored[suffix] += 1
    return arrange("folder", path, files, ignored, FolderOpener(path))


def walk(root: Path) -> Iterator[tuple[str, int]]:
    """Yield (relative path, size) of visible files; links are followed, a link to its own ancestor is not."""

    def visit(folder: str, prefix: str, ancestors: frozenset[tuple[int, int]]) -> Iterator[tuple[str, int]]:
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:
            return
        with os.scandir(folder) as children:
            for child in children:
                if hidden(child.name):
                    continue
                relative = os.path.join(prefix, child.name)
                if child.is_dir():
                    yield from visit(child.path, relative, ancestors | {identity})
                elif child.is_file():
                    yield relative, child.stat().st_size

    try:
        yield from visit(os.fspath(root), "", frozenset())
    except PermissionError as error:
        raise DataError(f"'{error.filename}' cannot be read: permission denied.") from error


def unsafe_name(name: str) -> str | None:
    """Return what is wrong with the name of an archive's member, or None."""
    if name.startswith("/") or name[1:2] == ":":
        return "an absolute name"
    return "a name with '..'" if ".." in name.split("/") else None


def arrange(
    kind: str, path: Path, files: list[ListedFile], ignored: Counter[str], opener: Opener, *, depth: int = 0
) -> Source:
    """Return the source of ``files``, whose classes are their folders, those of the first ``depth`` levels excepted.

    Raises DataError for an ambiguous layout.
    """
    if not files:
        raise DataError(_nothing_found(path, ignored))
    files.sort(key=lambda file: file.key.encode())
    parents = (file.key.rpartition("/")[0] for file in files)
    known: dict[str, list[str]] = {}  # one list a folder, not one a file
    folders = [known.setdefault(parent, parent.split("/") if parent else []) for parent in parents]
    # A folder that wraps everything is no class, as long as there are folders within it.
    while all(len(f) > depth and f[depth] == folders[0][depth] for f in folders) and any(
        len(f) > depth + 1 for f in folders
    ):
        depth += 1
    loose = next((file.key for file, f in zip(files, folders, strict=True) if len(f) == depth), None)
    if loose is not None and any(len(f) > depth for f in folders):
        raise DataError(
            f"'{path}' has images both beside and inside its sub-folders (such as '{loose}'): "
            "put every image in a folder named after its class, or all of them in one folder."
        )
    if loose is not None:
        entries = [file.entry(None) for file in files]
        return Source(kind, path, (), entries, ignored.total(), opener)
    names = sorted({f[depth] for f in folders}, key=str.encode)
    if len(names) > 1 and SPLIT_NAMES.issuperset(name.lower() for name in names):
        raise DataError(
            f"the folders of '{path}' are splits ({', '.join(names)}), not classes: "
            f"prepare each split from a folder or zip of its own."
        )
    number = {name: i for i, name in enumerate(names)}
    entries = [file.entry(number[f[depth]]) for file, f in zip(files, folders, strict=True)]
    return Source(kind, path, tuple(names), entries, ignored.total(), opener)


def _nothing_found(path: Path, ignored: Counter[str]) -> str:
    if not ignored:
        return f"'{path}' is empty: give a folder or zip archive of images."
    suffixes = ", ".join(suffix or "no suffix" for suffix, _ in ignored.most_common(3))
    files = f"{ignored.total():,} file{'s are' if ignored.total() > 1 else ' is'}"
    do = "unpack what is compressed" if _COMPRESSED & set(ignored) else "give .png, .jpg or .webp files"
    return f"'{path}' holds no images: its {files} of other kinds ({suffixes}); {do}."


def hidden(name: str) -> bool:
    """Whether a file or folder is passed over silently."""
    return name.startswith(".") or name == "__MACOSX"


def printable_name(name: str) -> str:
    """Escape what is not UTF-8 in a name of a file or a class, so that it can be hashed, printed and written."""
    try:
        encoded = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a character, which JSON can hold and no file name
        encoded = name.encode("utf-8", "surrogatepass")
    return encoded.decode("utf-8", "backslashreplace")
