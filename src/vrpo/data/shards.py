"""The prepared data set on disk: uint8 pixels in safetensors shards, described by a manifest.

``manifest.json`` names every shard with its size and SHA-256. A shard is an ordinary safetensors file with
the tensors ``pixels`` uint8 (n, 3, H, W), ``labels`` int64 (n,) where there are any, and the keys as
``key_bytes`` uint8 with ``key_offsets`` int64 (n + 1,). Rows have a fixed size, so a reader maps the files
and copies only the rows it needs.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vrpo.errors import DataError
from vrpo.untrusted import parse_json, printable, read_json, seal, unseal

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

_DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype("<u1"), "I64": np.dtype("<i8")}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BLOCK = 1 << 22
_MAX_HEADER = 1 << 20  # ours take some 400 bytes

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Record(BaseModel):
    """A part of a manifest or journal: immutable, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceRecord(Record):
    """Where the images came from: the name and kind of the source, and a hash of its list of images."""

    name: str
    kind: str
    listing: Digest


class Preprocessing(Record):
    """What was done to every image, and whether readers mirror at random."""

    size: Positive
    crop: Literal["centre"] = "centre"
    resample: Literal["box, then bicubic"] = "box, then bicubic"
    flip: Literal["none", "random"] = "none"
    max_pixels: Positive


class Counts(Record):
    """Images stored, images that could not be read, other files, and images smaller than the target size."""

    images: Positive
    bad: Count
    ignored: Count
    upscaled: Count


class ShardRecord(Record):
    """One shard: its file name, rows, size in bytes and SHA-256."""

    file: Annotated[str, Field(pattern=r"^shard-\d{5,}\.safetensors$")]
    rows: Positive
    bytes: Positive
    sha256: Digest


class BadImage(Record):
    """An image that was left out, and why."""

    key: str
    reason: str


class Manifest(Record):
    """The contents of ``manifest.json``; ``upscaled`` names at most the first thousand such images."""

    version: int = FORMAT_VERSION
    source: SourceRecord
    counts: Counts
    class_names: tuple[str, ...]
    class_counts: tuple[Count, ...]
    preprocessing: Preprocessing
    rows_per_shard: Positive
    shards: tuple[ShardRecord, ...]
    bad: tuple[BadImage, ...]
    upscaled: tuple[str, ...]
    fingerprint: Digest

    def to_json(self) -> str:
        """Return the text of ``manifest.json``, the same for the same data set."""
        return json.dumps(seal(self.model_dump(mode="json")), indent=1) + "\n"


def fingerprint(preprocessing: Preprocessing, shards: Sequence[ShardRecord]) -> str:
    """Hash what shapes the data: preprocessing, and the shards' hashes over pixels, labels and keys."""
    parts = [FORMAT_VERSION, preprocessing.model_dump(), [(shard.rows, shard.sha256) for shard in shards]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of the prepared data set in folder ``path``.

    Raises DataError where there is none, where a newer version wrote it, or where it is damaged.
    """
    file = Path(path) / MANIFEST
    try:
        content = read_json(file)
        version = int(content["version"])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"'{path}' holds no prepared data set (no {MANIFEST}): make one with 'vrpo prepare SOURCE {path}'."
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise _damaged_manifest(file, str(error)) from error
    if version > FORMAT_VERSION:
        raise DataError(
            f"'{path}' was prepared in format {version}, and this vrpo reads formats up to {FORMAT_VERSION}: "
            "update vrpo or prepare the source again."
        )
    try:
        manifest = Manifest.model_validate(_unsealed(content, file))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise _damaged_manifest(file, f"{place}: {first['msg']}") from error
    if manifest.fingerprint != fingerprint(manifest.preprocessing, manifest.shards) or (
        manifest.counts.images != sum(shard.rows for shard in manifest.shards)
    ):
        raise _damaged_manifest(file, "its entries contradict its fingerprint")
    return manifest


def _unsealed(content: dict[str, Any], file: Path) -> dict[str, Any]:
    try:
        return unseal(content, required=False)
    except ValueError as error:
        raise _damaged_manifest(file, str(error)) from error


def _damaged_manifest(file: Path, reason: str) -> DataError:
    return DataError(f"'{file}' is damaged ({reason}): delete its folder and prepare the source again.")


def write_atomically(file: Path, parts: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write ``parts`` to ``file`` by way of a hidden file, flushed and renamed; return size and SHA-256.

    Either the whole file appears under its name or none of it; an OSError leaves nothing behind.
    """
    hidden = file.with_name(f".{file.name}.tmp")
    digest = hashlib.sha256()
    size = 0
    try:
        with open(hidden, "wb") as stream:
            for part in parts:
                stream.write(part)
                digest.update(part)
                size += len(part)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(hidden, file)
    except BaseException:
        hidden.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself must reach the disk
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return size, digest.hexdigest()


def write_shard(
    folder: Path,
    index: int,
    pixels: Sequence[NDArray[np.uint8]],
    labels: Sequence[int] | None,
    keys: Sequence[str],
) -> ShardRecord:
    """Write shard ``index`` from blocks of pixels (n_i, 3, H, W), labels and keys of all rows together."""
    encoded = [key.encode() for key in keys]
    offsets = np.zeros(len(keys) + 1, dtype="<i8")
    np.cumsum([len(key) for key in encoded], out=offsets[1:])
    rows = len(keys)
    # Eight-byte tensors come first, so that every tensor lies aligned in the file.
    tensors: dict[str, tuple[tuple[int, ...], np.dtype[Any], Sequence[NDArray[Any]]]] = {}
    if labels is not None:
        tensors["labels"] = ((rows,), _DTYPES["I64"], [np.asarray(labels, dtype="<i8")])
    tensors["key_offsets"] = ((rows + 1,), _DTYPES["I64"], [offsets])
    tensors["pixels"] = ((rows, *pixels[0].shape[1:]), _DTYPES["U8"], pixels)
    joined = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    tensors["key_bytes"] = (joined.shape, _DTYPES["U8"], [joined])

    header: dict[str, Any] = {}
    end = 0
    for name, (shape, dtype, _) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * ((-len(text) - 8) % 64)  # the data starts at a multiple of 64 bytes
    parts: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text]
    for _, _, blocks in tensors.values():
        parts += [np.ascontiguousarray(block).reshape(-1).view(np.uint8).data for block in blocks]
    name = f"shard-{index:05d}.safetensors"
    size, digest = write_atomically(folder / name, parts)
    return ShardRecord(file=name, rows=rows, bytes=size, sha256=digest)


class ShardedDataset:
    """A prepared data set, read by memory map.

    Opening checks that every shard is there, has its recorded size and a header that fits the manifest;
    ``verify`` reads everything and checks the hashes. Raises DataError that names the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.image_size = self.manifest.preprocessing.size
        self.channels = 3
        self.class_names = self.manifest.class_names
        self.num_classes = len(self.class_names)
        self.labelled = self.num_classes > 0
        self.fingerprint = self.manifest.fingerprint
        self._shards = [self._map(record) for record in self.manifest.shards]
        self._starts = np.cumsum([0, *(record.rows for record in self.manifest.shards)])
        self._labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[type[ShardedDataset], tuple[Path]]:
        return ShardedDataset, (self.path,)

    def read(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """Return pixels uint8 (B, 3, H, W) and labels int64 (B,) (None where unlabelled) of rows ``indices``.

        Raises IndexError for a row outside 0 .. N - 1.
        """
        import torch

        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"rows {indices.min()} .. {indices.max()} of {len(self)}")
        pixels = np.empty((len(indices), self.channels, self.image_size, self.image_size), dtype=np.uint8)
        shard_of = np.searchsorted(self._starts, indices, side="right") - 1
        for shard in np.unique(shard_of):
            places = np.flatnonzero(shard_of == shard)
            pixels[places] = self._shards[shard]["pixels"][indices[places] - self._starts[shard]]
        labels = self.labels()
        return torch.from_numpy(pixels), None if labels is None else torch.from_numpy(labels[indices])

    def labels(self) -> NDArray[np.int64] | None:
        """Return all labels, int64 (N,), or None where the data set is unlabelled."""
        if self._labels is None and self.labelled:
            labels = [shard["labels"] for shard in self._shards]
            for record, part in zip(self.manifest.shards, labels, strict=True):
                if part.min() < 0 or part.max() >= self.num_classes:
                    raise DataError(
                        f"'{self.path / record.file}' has a label outside 0 .. {self.num_classes - 1}: "
                        "delete the folder and prepare the source again."
                    )
            self._labels = np.concatenate(labels).astype(np.int64)
        return self._labels

    def key(self, index: int) -> str:
        """Return the key of row ``index``: its path within the source."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        tensors = self._shards[shard]
        begin, end = tensors["key_offsets"][index - self._starts[shard] :][:2]
        return printable(bytes(tensors["key_bytes"][begin:end]).decode("utf-8", "backslashreplace"))

    def verify(self, progress: Callable[[int, int], None] | None = None, rank: int = 0, world_size: int = 1) -> None:
        """Read every shard and compare its SHA-256; ``progress`` is told bytes read and bytes in all.

        Of ``world_size`` processes, each reads every ``world_size``-th shard, beginning at its rank.
        Raises DataError that names every shard whose bytes have changed.
        """
        shards = self.manifest.shards[rank::world_size]
        total = sum(record.bytes for record in shards)
        done = 0
        changed = []
        for record in shards:
            digest = hashlib.sha256()
            with open(self.path / record.file, "rb") as stream:
                while block := stream.read(_BLOCK):
                    digest.update(block)
                    done += len(block)
                    if progress is not None:
                        progress(done, total)
            if digest.hexdigest() != record.sha256:
                changed.append(record.file)
        if changed:
            raise DataError(
                f"the bytes of {', '.join(changed)} in '{self.path}' are not those that were prepared "
                "(SHA-256 differs): delete the folder and prepare the source again."
            )

    def _map(self, record: ShardRecord) -> Mapping[str, NDArray[Any]]:
        file = self.path / record.file
        again = "delete the folder and prepare the source again."
        try:
            size = file.stat().st_size
        except OSError as error:
            raise DataError(f"'{file}' is missing ({error.strerror}): {again}") from error
        if size != record.bytes:
            change = "truncated to" if size < record.bytes else "grown to"
            raise DataError(f"'{file}' is {change} {size:,} of {record.bytes:,} bytes: {again}")
        row = (self.channels, self.image_size, self.image_size)
        expected = {"pixels": (record.rows, *row), "key_offsets": (record.rows + 1,), "key_bytes": None}
        if self.labelled:
            expected["labels"] = (record.rows,)
        mapped = np.memmap(file, dtype=np.uint8, mode="r")
        try:
            tensors = _views(mapped)
            fits = all(shape in (None, tensors[name].shape) for name, shape in expected.items())
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise DataError(f"'{file}' has a damaged header: {again}") from error
        if not fits:
            raise DataError(f"'{file}' does not hold what {MANIFEST} says: {again}")
        return tensors


def _views(mapped: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Return views of the tensors in a mapped safetensors file (8-byte header length, JSON header, data)."""
    start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
    if start > min(len(mapped), _MAX_HEADER):
        raise ValueError("header longer than the file")
    header = parse_json(mapped[8:start].tobytes())
    views = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = map(operator.index, entry["data_offsets"])
            if not 0 <= begin <= end <= len(mapped) - start or min(entry["shape"], default=0) < 0:
                raise ValueError(f"{name} lies outside the file")
            data = np.asarray(mapped[start + begin : start + end])
            views[name] = data.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return views


def verify_dataset(path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Check the hash of every shard of the prepared data set in ``path`` and return its manifest."""
    dataset = ShardedDataset(path)
    dataset.verify(progress)
    return dataset.manifest
