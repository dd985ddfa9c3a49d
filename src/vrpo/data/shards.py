"""The prepared data set on disk: pixels, latents or both in safetensors shards, described by a manifest.

``manifest.json`` names every shard with its size and SHA-256. A shard is an ordinary safetensors file with the
tensors ``pixels`` uint8 (n, 3, H, W), ``latents`` and those of the mirror images ``latents_flip`` float16 (n, C, h, w)
where there are any, ``labels`` int64 (n,) where there are any, and the keys as ``key_bytes`` uint8 with
``key_offsets`` int64 (n + 1,). Rows have a fixed size, so a reader maps the files and copies only the rows it needs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vrpo.data.manifest import MANIFEST, Manifest, ShardRecord, read_manifest
from vrpo.data.tensors import Blocks, Place, file_parts, read_header, read_tensor
from vrpo.errors import DataError
from vrpo.files import replacing
from vrpo.mapped import MappedFile
from vrpo.untrusted import printable

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 22
_REPEAT = "repeat the 'vrpo prepare' that made it, and the shard is made again."
_MAKE_AGAIN = f"delete the file and {_REPEAT}"


def write_atomically(file: Path, parts: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write ``parts`` to ``file``, whole or not at all as ``replacing`` does; return size and SHA-256."""
    digest = hashlib.sha256()
    size = 0
    with replacing(file) as unfinished, open(unfinished, "wb") as stream:
        for part in parts:
            stream.write(part)
            digest.update(part)
            size += len(part)
    return size, digest.hexdigest()


@dataclass(frozen=True)
class Rows:
    """Consecutive rows to store: pixels uint8 (n, 3, H, W), latents and mirrored latents float16 (n, C, h, w)."""

    pixels: NDArray[np.uint8] | None
    latents: NDArray[np.float16] | None = None
    latents_flip: NDArray[np.float16] | None = None


def write_shard(
    folder: Path, index: int, blocks: Sequence[Rows], labels: Sequence[int] | None, keys: Sequence[str]
) -> ShardRecord:
    """Write shard ``index`` from blocks of rows, and the labels and keys of all rows together."""
    encoded = [key.encode() for key in keys]
    offsets = np.zeros(len(keys) + 1, dtype="<i8")
    np.cumsum([len(key) for key in encoded], out=offsets[1:])
    rows = len(keys)
    # Eight-byte tensors come first, so that every tensor lies aligned in the file.
    tensors: dict[str, Blocks] = {}
    if labels is not None:
        tensors["labels"] = Blocks((rows,), "I64", [np.asarray(labels, dtype="<i8")])
    tensors["key_offsets"] = Blocks((rows + 1,), "I64", [offsets])
    for name, dtype in (("latents", "F16"), ("latents_flip", "F16"), ("pixels", "U8")):
        parts = [part for part in (getattr(block, name) for block in blocks) if part is not None]
        if parts:
            tensors[name] = Blocks((rows, *parts[0].shape[1:]), dtype, parts)
    joined = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    tensors["key_bytes"] = Blocks(joined.shape, "U8", [joined])
    name = f"shard-{index:05d}.safetensors"
    size, digest = write_atomically(folder / name, file_parts(tensors))
    return ShardRecord(file=name, rows=rows, bytes=size, sha256=digest)


class ShardedDataset:
    """A prepared data set, read by memory map.

    Opening checks that every shard is there, has its recorded size and a header that fits the manifest;
    ``verify`` reads everything and checks the hashes. Raises DataError that names the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.latents = self.manifest.latents
        self.image_size = self.manifest.preprocessing.size
        self.channels = 3
        self.class_names = self.manifest.class_names
        self.num_classes = len(self.class_names)
        self.labelled = self.num_classes > 0
        self.fingerprint = self.manifest.fingerprint
        self._shapes = self._row_shapes()
        self._shards = [self._header(record) for record in self.manifest.shards]
        self._starts = np.cumsum([0, *(record.rows for record in self.manifest.shards)])
        self._files: list[MappedFile] = []
        self._tensors: dict[str, list[NDArray[np.uint8]]] = {}
        self._labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[type[ShardedDataset], tuple[Path]]:
        return ShardedDataset, (self.path,)

    @property
    def holds_pixels(self) -> bool:
        """Whether ``read`` can return pixels."""
        return self.manifest.holds_pixels

    @property
    def in_channels(self) -> int:
        """Channels of what a diffusion model is trained on: pixels, or latents where there are any."""
        return self.channels if self.latents is None else self.latents.channels

    @property
    def input_size(self) -> int:
        """Side of what a diffusion model is trained on."""
        return self.image_size if self.latents is None else self.latents.size

    def read(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """Return pixels uint8 (B, 3, H, W) and labels int64 (B,) (None where unlabelled) of rows ``indices``.

        Raises IndexError for a row outside 0 .. N - 1, and DataError where only latents are stored.
        """
        import torch

        if not self.holds_pixels:
            raise DataError(
                f"'{self.path}' holds latents without pixels: prepare the images with --keep-pixels, or give another "
                "data set."
            )
        indices = self._checked(indices)
        pixels = np.empty((len(indices), *self._shapes["pixels"]), dtype=np.uint8)
        self._gather(["pixels"], indices, np.zeros(len(indices), dtype=np.int64), pixels)
        labels = self.labels()
        return torch.from_numpy(pixels), None if labels is None else torch.from_numpy(labels[indices])

    def read_latents(self, indices: NDArray[np.int64], flipped: NDArray[np.bool_] | None = None) -> Tensor:
        """Return stored latents float16 (B, C, h, w) of rows ``indices``, of the mirror image where ``flipped``.

        C is that of the latents, twice over where mean and standard deviation are stored. Raises IndexError for a
        row outside 0 .. N - 1, and DataError where there are no latents, or none of mirror images.
        """
        import torch

        if self.latents is None:
            raise DataError(f"'{self.path}' holds no latents: prepare it with --latents NAME.")
        indices = self._checked(indices)
        names, sides = ["latents"], np.zeros(len(indices), dtype=np.int64)
        if flipped is not None and flipped.any():
            if "latents_flip" not in self._shapes:
                raise DataError(f"'{self.path}' holds no latents of mirror images: prepare it with --flip.")
            names, sides = ["latents", "latents_flip"], flipped.astype(np.int64)
        rows = np.empty((len(indices), *self._shapes["latents"]), dtype=np.float16)
        self._gather(names, indices, sides, rows)
        return torch.from_numpy(rows)

    def labels(self) -> NDArray[np.int64] | None:
        """Return all labels, int64 (N,), or None where the data set is unlabelled."""
        if self._labels is None and self.labelled:
            parts = []
            for record, places in zip(self.manifest.shards, self._shards, strict=True):
                part = read_tensor(self.path / record.file, places["labels"])
                if part.min() < 0 or part.max() >= self.num_classes:
                    raise DataError(
                        f"'{self.path / record.file}' has a label outside 0 .. {self.num_classes - 1}: {_MAKE_AGAIN}"
                    )
                parts.append(part)
            self._labels = np.concatenate(parts).astype(np.int64)
        return self._labels

    def key(self, index: int) -> str:
        """Return the key of row ``index``: its path within the source."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        file, places = self.path / self.manifest.shards[shard].file, self._shards[shard]
        row = index - int(self._starts[shard])
        begin, end = read_tensor(file, places["key_offsets"], row, row + 2)
        try:
            key = read_tensor(file, places["key_bytes"], int(begin), int(end)).tobytes()
        except ValueError as error:
            raise DataError(f"'{file}' has damaged keys: {_MAKE_AGAIN}") from error
        return printable(key.decode("utf-8", "backslashreplace"))

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
                f"(SHA-256 differs): {_MAKE_AGAIN}"
            )

    def _checked(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"rows {indices.min()} .. {indices.max()} of {len(self)}")
        return indices

    def _gather(
        self, names: Sequence[str], indices: NDArray[np.int64], which: NDArray[np.int64], out: NDArray[Any]
    ) -> None:
        """Copy rows ``indices`` into ``out``, each from the tensor ``names[which]``, in the order of the file."""
        tensors = [self._mapped(name) for name in names]
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        for shard in np.unique(shards).tolist():
            self._files[shard].check()
        rows = indices - self._starts[shards]
        target = out.view(np.uint8).reshape(len(out), tensors[0][0].shape[1])
        # One copy a row from map to batch: numpy's fancy indexing would make two.
        for place, (side, shard, row) in enumerate(zip(which.tolist(), shards.tolist(), rows.tolist(), strict=True)):
            target[place] = tensors[side][shard][row]

    def _mapped(self, name: str) -> list[NDArray[np.uint8]]:
        """Return one tensor of every shard as bytes (n, row bytes), all mapped at the first use."""
        if not self._files:
            self._files = [MappedFile(self.path / record.file, record.bytes) for record in self.manifest.shards]
        if name not in self._tensors:
            self._tensors[name] = [
                mapped.bytes[places[name].begin : places[name].end].reshape(record.rows, places[name].row_bytes)
                for mapped, record, places in zip(self._files, self.manifest.shards, self._shards, strict=True)
            ]
        return self._tensors[name]

    def _row_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of a row of each tensor that holds images."""
        shapes: dict[str, tuple[int, ...]] = {}
        if self.holds_pixels:
            shapes["pixels"] = (self.channels, self.image_size, self.image_size)
        if self.latents is not None:
            shapes["latents"] = (self.latents.stored_channels, self.latents.size, self.latents.size)
            if self.manifest.preprocessing.flip == "random":
                shapes["latents_flip"] = shapes["latents"]
        return shapes

    def _header(self, record: ShardRecord) -> Mapping[str, Place]:
        file = self.path / record.file
        try:
            size = file.stat().st_size
        except OSError as error:
            raise DataError(f"'{file}' is missing ({error.strerror}): {_REPEAT}") from error
        if size != record.bytes:
            change = "truncated to" if size < record.bytes else "grown to"
            raise DataError(f"'{file}' is {change} {size:,} of {record.bytes:,} bytes: {_REPEAT}")
        expected: dict[str, tuple[str, tuple[int, ...] | None]] = {
            name: ("U8" if name == "pixels" else "F16", (record.rows, *shape)) for name, shape in self._shapes.items()
        }
        expected |= {"key_offsets": ("I64", (record.rows + 1,)), "key_bytes": ("U8", None)}
        if self.labelled:
            expected["labels"] = ("I64", (record.rows,))
        try:
            places = read_header(file)
        except (OSError, ValueError) as error:
            raise DataError(f"'{file}' has a damaged header: {_MAKE_AGAIN}") from error
        for name, (dtype, shape) in expected.items():
            place = places.get(name)
            if place is None or place.dtype != dtype or shape not in (None, place.shape):
                raise DataError(f"'{file}' does not hold what {MANIFEST} says: {_MAKE_AGAIN}")
        return places


def verify_dataset(path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Check the hash of every shard of the prepared data set in ``path`` and return its manifest."""
    dataset = ShardedDataset(path)
    dataset.verify(progress)
    return dataset.manifest
