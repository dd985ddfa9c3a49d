"""Images to be scored: data sets, folders, archives, arrays and tensors as batches in a fixed order."""

from __future__ import annotations

import hashlib
import math
import os
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vrpo.data.manifest import MANIFEST
from vrpo.data.shards import ShardedDataset
from vrpo.data.transforms import decode_whole, image_size
from vrpo.errors import DataError, EvaluationError
from vrpo.evaluation.npz import npz_members, open_array

if TYPE_CHECKING:
    from vrpo.data.sources import Entry, Source

_DECODERS = 4
# The largest image that is read, encoded or as pixels: 64 megapixels of RGB.
_MAX_BYTES = 192 << 20
# The pixels of a batch: 64 images of 1,024 px, and fewer of larger ones.
_BATCH_BYTES = 192 << 20


@dataclass(frozen=True)
class ImageSet:
    """Images to be scored: ``batches(size)`` yields uint8 (B, 3, H, W) in a fixed order, ``count`` in all.

    A batch has at most ``size`` images, and fewer where they are so large that memory would not hold as many.
    ``identify`` returns text that changes whenever the images do, asked of reference images only; ``folder``
    is where their features may be kept, if anywhere.
    """

    name: str
    count: int
    batches: Callable[[int], Iterator[Tensor]]
    identify: Callable[[], str] = str
    folder: Path | None = None

    @cached_property
    def fingerprint(self) -> str:
        """What ``identify`` returned, asked once."""
        return self.identify()


ImageLike = ImageSet | ShardedDataset | Tensor | str | os.PathLike[str]


def open_images(source: ImageLike) -> ImageSet:
    """Open a prepared data set, a folder or zip of images, an ``.npz``, or a tensor, as an `ImageSet`.

    An ``.npz`` holds ``arr_0``, uint8 (N, H, W, 3), as the ADM evaluator reads it; a tensor is uint8 (N, 3,
    H, W). Raises EvaluationError or DataError where it holds no images or cannot be read.
    """
    if isinstance(source, ImageSet):
        return source
    if isinstance(source, Tensor):
        return _from_tensor(source)
    if isinstance(source, ShardedDataset):
        return _from_dataset(source)
    path = Path(source)
    if (path / MANIFEST).is_file():
        return _from_dataset(ShardedDataset(path))
    if path.suffix == ".npz":
        return _from_npz(path)
    from vrpo.data.sources import open_source

    return _from_source(open_source(path))


def first_images(images: ImageSet, count: int) -> ImageSet:
    """Return the first ``count`` images of a set; raises EvaluationError where there are fewer."""
    if images.count < count:
        raise EvaluationError(
            f"There are {images.count:,} images in {images.name} and {count:,} were asked for; give more, or lower "
            "the number of samples."
        )

    def batches(size: int) -> Iterator[Tensor]:
        left = count
        for batch in images.batches(min(size, count)):
            yield batch[:left]
            left -= len(batch)
            if left <= 0:
                return

    return ImageSet(images.name, count, batches)


def regroup(batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Yield the images of ``batches`` in the batches that `open_images` of a file yields, whatever theirs are."""
    held: list[Tensor] = []
    for batch in batches:
        size = _fitting(size, batch[0].numel())
        held.append(batch)
        while sum(map(len, held)) >= size:
            full, rest = torch.cat(held).tensor_split([size])
            held = [rest] if len(rest) else []
            yield full
    if held:
        yield torch.cat(held)


def _from_tensor(images: Tensor) -> ImageSet:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise EvaluationError(
            f"Images are a {images.dtype} tensor of shape {tuple(images.shape)}; give uint8 (N, 3, H, W)."
        )

    def identify() -> str:
        digest = hashlib.sha256(repr(tuple(images.shape)).encode())
        for part in images.split(1024):
            digest.update(part.contiguous().cpu().numpy().data)
        return digest.hexdigest()

    return ImageSet("images in memory", len(images), lambda size: iter(images.split(size)), identify)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.features")


def _fitting(size: int, image_bytes: int) -> int:
    """Return how many of ``size`` images a batch may hold."""
    return max(1, min(size, _BATCH_BYTES // image_bytes))


def _from_dataset(dataset: ShardedDataset) -> ImageSet:
    def batches(size: int) -> Iterator[Tensor]:
        size = _fitting(size, 3 * dataset.image_size**2)
        for start in range(0, len(dataset), size):
            yield dataset.read(np.arange(start, min(start + size, len(dataset))))[0]

    name, folder = dataset.path.resolve().name, dataset.path / "features"
    return ImageSet(name, len(dataset), batches, lambda: dataset.fingerprint, folder)


def _from_source(source: Source) -> ImageSet:
    """Images of a folder or zip, all of one size; equal files have equal fingerprints in either."""

    def identify() -> str:
        digest = hashlib.sha256()
        for entry, content in zip(source.entries, _contents(source, source.entries), strict=True):
            digest.update(f"{entry.key}\0{len(content)}\0".encode())
            digest.update(content)
        return digest.hexdigest()

    def batches(size: int) -> Iterator[Tensor]:
        first = source.entries[0]
        width, height = _header_size(next(_contents(source, [first])), first.key)
        if 3 * width * height > _MAX_BYTES:
            raise EvaluationError(
                f"Image '{first.key}' has {width}x{height} pixels, which exceed the limit of {_MAX_BYTES // 3:,}; give "
                "smaller ones."
            )
        size = _fitting(size, 3 * width * height)
        images = _decoded(source, (width, height))
        for start in range(0, len(source.entries), size):
            batch = np.empty((min(size, len(source.entries) - start), 3, height, width), np.uint8)
            for place, image in enumerate(islice(images, len(batch))):
                batch[place] = image.transpose(2, 0, 1)
            yield torch.from_numpy(batch)

    return ImageSet(source.name, len(source.entries), batches, identify, _beside(source.path))


def _contents(source: Source, entries: Sequence[Entry]) -> Iterator[bytes]:
    for entry in entries:
        try:
            with source.open(entry) as stream:
                content = stream.read(_MAX_BYTES + 1)
        except Exception as error:  # a damaged zip member raises any of zlib's, zipfile's and the system's errors
            raise EvaluationError(f"Image '{entry.key}' cannot be read ({error}); replace it or remove it.") from error
        if len(content) > _MAX_BYTES:
            raise EvaluationError(f"Image '{entry.key}' is larger than {_MAX_BYTES:,} bytes; remove it.")
        yield content


def _decoded(source: Source, size: tuple[int, int]) -> Iterator[NDArray[np.uint8]]:
    """Decode the images of a source, all of one width and height, (H, W, 3) each; few are in memory at a time."""

    def decode(content: bytes, key: str) -> NDArray[np.uint8]:
        width, height = _header_size(content, key)
        if (width, height) != size:
            raise EvaluationError(
                f"'{source.name}' mixes image sizes: '{key}' has {width}x{height} pixels where the first image has "
                f"{size[0]}x{size[1]}; bring all to one size with 'vrpo prepare'."
            )
        with _decoding(key):
            return decode_whole(content)

    pending: deque[Future[NDArray[np.uint8]]] = deque()
    with ThreadPoolExecutor(_DECODERS) as pool:
        for entry, content in zip(source.entries, _contents(source, source.entries), strict=True):
            pending.append(pool.submit(decode, content, entry.key))
            if len(pending) > _DECODERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _header_size(content: bytes, key: str) -> tuple[int, int]:
    with _decoding(key):
        return image_size(content)


@contextmanager
def _decoding(key: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise EvaluationError(f"Image '{key}' cannot be decoded ({error}); replace it or remove it.") from error


def _from_npz(path: Path) -> ImageSet:
    """Images of ``arr_0``, uint8 (N, H, W, 3), read as a stream: 50,000 at 256 px are 10 GB."""
    if "arr_0" not in npz_members(path):
        raise EvaluationError(
            f"{path} holds no images (no array 'arr_0'); give an .npz with uint8 images (N, H, W, 3)."
        )
    with zipfile.ZipFile(path) as archive:
        checksum = archive.getinfo("arr_0.npy").CRC
        with open_array(archive, "arr_0", path) as (_, shape, fortran_order, dtype):
            pass
    if fortran_order:
        raise EvaluationError(f"'arr_0' of {path} is in Fortran order; save numpy.ascontiguousarray of it.")
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[0] == 0:
        raise EvaluationError(
            f"'arr_0' of {path} is {dtype} of shape {shape}; give uint8 images (N, H, W, 3) with N > 0."
        )
    image_bytes = math.prod(shape[1:])
    if not 0 < image_bytes <= _MAX_BYTES:
        raise EvaluationError(f"'arr_0' of {path} has images of {shape[2]}x{shape[1]} pixels; give smaller ones.")

    def batches(size: int) -> Iterator[Tensor]:
        size = _fitting(size, image_bytes)
        with zipfile.ZipFile(path) as archive, open_array(archive, "arr_0", path) as (stream, *_):
            for start in range(0, shape[0], size):
                count = min(size, shape[0] - start)
                try:
                    content = stream.read(count * image_bytes)
                    pixels = np.frombuffer(content, dtype=np.uint8).reshape(count, *shape[1:])
                except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                    raise EvaluationError(f"{path} is damaged ({error}); write it again.") from error
                yield torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())

    fingerprint = hashlib.sha256(repr(("npz", shape, checksum)).encode()).hexdigest()
    return ImageSet(path.name, shape[0], batches, lambda: fingerprint, _beside(path))
