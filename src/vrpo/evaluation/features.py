"""From images to features: every kind of source in batches, and reference features kept beside their data."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vrpo.data.shards import MANIFEST, ShardedDataset
from vrpo.errors import EvaluationError
from vrpo.evaluation.frechet import FeatureStatistics
from vrpo.evaluation.protocol import FeaturesRecord, ReferenceRecord

if TYPE_CHECKING:
    from vrpo.data.sources import Entry, Source

# The ADM suite compares manifolds with 10,000 reference images.
MANIFOLD_IMAGES = 10_000
_MANIFOLD_SEED = 0
_DECODERS = 4


class FeatureNetwork(Protocol):
    """What evaluation needs of a frozen network; `vrpo.vision.encoders.load_feature_network` gives one."""

    name: str
    weights_hash: str
    input_size: int

    def pooled(self, images: Tensor) -> Tensor:
        """Return float32 features (B, D) of uint8 images (B, 3, H, W)."""


@dataclass(frozen=True)
class ImageSet:
    """Images to be scored: ``batches(size)`` yields uint8 (B, 3, H, W) in a fixed order, ``count`` in all.

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


@dataclass(frozen=True)
class Reference:
    """Features of reference images: moments of all, and vectors of at most 10,000 (None where not kept)."""

    record: ReferenceRecord
    features: FeaturesRecord
    statistics: FeatureStatistics
    vectors: Tensor | None


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


def feature_batches(
    images: ImageSet, network: FeatureNetwork, *, batch_size: int = 64, progress: bool = False
) -> Iterator[Tensor]:
    """Yield float32 features (B, D) on the CPU, batch by batch in the order of the images.

    Raises EvaluationError where the network returns NaN or infinity.
    """
    device = network_device(network)
    done = 0
    with _progress_bar(progress) as bar:
        task = bar.add_task(f"features of {images.name}", total=images.count) if bar else None
        for batch in images.batches(batch_size):
            features = network.pooled(batch.to(device)).float().cpu()
            if not torch.isfinite(features).all():
                raise EvaluationError(
                    f"{network.name} returned NaN or infinite features for images {done:,} to "
                    f"{done + len(batch) - 1:,} of {images.name}; check its weights file."
                )
            done += len(batch)
            if bar and task is not None:
                bar.update(task, completed=done)
            yield features


def extract_features(
    source: ImageLike, network: FeatureNetwork, *, batch_size: int = 64, progress: bool = False
) -> Tensor:
    """Return the features of all images, float32 (N, D)."""
    images = open_images(source)
    matrix: Tensor | None = None
    done = 0
    for features in feature_batches(images, network, batch_size=batch_size, progress=progress):
        if matrix is None:
            matrix = torch.empty(images.count, features.shape[1])
        matrix[done : done + len(features)] = features
        done += len(features)
    if matrix is None:
        raise EvaluationError(f"There are no images in {images.name}; give at least one.")
    return matrix


def load_reference(
    source: ImageLike | Reference,
    network: FeatureNetwork,
    *,
    cache: Path | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Reference:
    """Return the reference features of images, from the cache where they were computed before.

    The cache is the folder ``cache``, or ``features`` inside a prepared data set; its key holds the data's
    fingerprint and the network's name, weights, input size and precision. A cache file is itself a valid
    source. Raises EvaluationError for features of another network.
    """
    features = FeaturesRecord.of(network)
    if isinstance(source, Reference):
        if source.features != features:
            raise _other_network(source.record.name, source.features.architecture, features)
        return source
    if isinstance(source, str | os.PathLike) and Path(source).suffix == ".npz":
        path = Path(source)
        members = _npz_members(path)
        if "arr_0" not in members and {"mu", "sigma"} <= members:
            return _read_reference(path, features)
    images = open_images(source)
    file = _cache_file(cache or images.folder, images, features)
    if file is not None and file.is_file():
        try:
            return _read_reference(file, features)
        except EvaluationError:
            # A damaged file is replaced: the images are at hand.
            pass
    chosen = _manifold_indices(images.count)
    statistics, parts, done = FeatureStatistics(), [], 0
    for batch in feature_batches(images, network, batch_size=batch_size, progress=progress):
        statistics.update(batch)
        first, last = np.searchsorted(chosen, (done, done + len(batch)))
        parts.append(batch[torch.from_numpy(chosen[first:last] - done)])
        done += len(batch)
    record = ReferenceRecord(images.name, images.count, images.fingerprint)
    vectors = torch.cat(parts)
    reference = Reference(record, features, statistics, vectors)
    if file is not None and images.count > 1:
        _write_reference(file, reference, vectors)
    return reference


def _manifold_indices(count: int) -> NDArray[np.int64]:
    """Ascending indices of the images that stand for the reference manifold, the same for every run."""
    if count <= MANIFOLD_IMAGES:
        return np.arange(count)
    return np.sort(np.random.RandomState(_MANIFOLD_SEED).choice(count, MANIFOLD_IMAGES, replace=False))


def _cache_file(folder: Path | None, images: ImageSet, features: FeaturesRecord) -> Path | None:
    if folder is None or not images.fingerprint:
        return None
    key = hashlib.sha256(repr((images.fingerprint, features)).encode()).hexdigest()[:16]
    return folder / f"{features.architecture.replace('/', '-')}-{features.input_size}-{key}.npz"


def _write_reference(file: Path, reference: Reference, vectors: Tensor) -> None:
    fields = {"name": reference.record.name, "fingerprint": reference.record.fingerprint}
    fields |= {f"features_{name}": value for name, value in vars(reference.features).items()}
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        reference.statistics.save(temporary, vectors=vectors.numpy(), **fields)
        os.replace(temporary, file)
    except OSError:
        # A read-only or full disk costs the next evaluation time, not this one its result.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _read_reference(file: Path, features: FeaturesRecord) -> Reference:
    statistics = FeatureStatistics.load(file)
    with np.load(file, allow_pickle=False) as archive:
        entries = {name: archive[name] for name in archive.files if name not in ("mu", "sigma")}
    missing = {f"features_{name}" for name in vars(features)} - set(entries)
    if missing:
        raise EvaluationError(
            f"{file.name} does not say which feature network its 'mu' and 'sigma' belong to; give the images instead."
        )
    values = {name: entries[f"features_{name}"].item() for name in vars(features)}
    if FeaturesRecord(**values) != features:
        raise _other_network(file.name, values["architecture"], features)
    vectors = torch.from_numpy(entries["vectors"]) if "vectors" in entries else None
    if vectors is not None and len(vectors) == statistics.count:
        # With every row at hand, a set smaller than its dimensions keeps its exact covariance factor.
        statistics = FeatureStatistics()
        statistics.update(vectors)
    record = ReferenceRecord(str(entries.get("name", file.name)), statistics.count, str(entries.get("fingerprint", "")))
    return Reference(record, features, statistics, vectors)


def _other_network(name: str, architecture: str, features: FeaturesRecord) -> EvaluationError:
    return EvaluationError(
        f"The reference {name} holds features of {architecture} with other weights, input size or precision "
        f"than the {features.architecture} at {features.input_size} px asked for; give the images or use "
        "that network."
    )


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


def _from_dataset(dataset: ShardedDataset) -> ImageSet:
    def batches(size: int) -> Iterator[Tensor]:
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
        shape: tuple[int, ...] | None = None
        with ThreadPoolExecutor(_DECODERS) as pool:
            for start in range(0, len(source.entries), size):
                entries = source.entries[start : start + size]
                decoded = list(pool.map(_decode, _contents(source, entries), (entry.key for entry in entries)))
                shape = shape or decoded[0].shape
                for entry, image in zip(entries, decoded, strict=True):
                    if image.shape != shape:
                        raise EvaluationError(
                            f"'{source.name}' mixes image sizes: '{entry.key}' has "
                            f"{image.shape[1]}x{image.shape[0]} pixels where the first image has "
                            f"{shape[1]}x{shape[0]}; bring all to one size with 'vrpo prepare'."
                        )
                yield torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous()

    return ImageSet(source.name, len(source.entries), batches, identify)


def _contents(source: Source, entries: Sequence[Entry]) -> Iterator[bytes]:
    for entry in entries:
        with source.open(entry) as stream:
            yield stream.read()


def _decode(content: bytes, key: str) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # decoders raise any type on damaged bytes
        raise EvaluationError(f"Image '{key}' cannot be decoded ({error}); replace it or remove it.") from error


def _from_npz(path: Path) -> ImageSet:
    """Images of ``arr_0``, uint8 (N, H, W, 3), read as a stream: 50,000 at 256 px are 10 GB."""
    if "arr_0" not in _npz_members(path):
        raise EvaluationError(
            f"{path} holds no images (no array 'arr_0'); give an .npz with uint8 images (N, H, W, 3)."
        )
    with zipfile.ZipFile(path) as archive:
        checksum = archive.getinfo("arr_0.npy").CRC
        with archive.open("arr_0.npy") as stream:
            shape, dtype = _npy_header(stream, path)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[0] == 0:
        raise EvaluationError(
            f"'arr_0' of {path} is {dtype} of shape {shape}; give uint8 images (N, H, W, 3) with N > 0."
        )
    image_bytes = int(np.prod(shape[1:]))

    def batches(size: int) -> Iterator[Tensor]:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
            _npy_header(stream, path)
            for start in range(0, shape[0], size):
                count = min(size, shape[0] - start)
                try:
                    content = stream.read(count * image_bytes)
                    pixels = np.frombuffer(content, dtype=np.uint8).reshape(count, *shape[1:])
                except (ValueError, EOFError, zipfile.BadZipFile) as error:
                    raise EvaluationError(f"{path} is damaged ({error}); write it again.") from error
                yield torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).contiguous()

    fingerprint = hashlib.sha256(repr(("npz", shape, checksum)).encode()).hexdigest()
    return ImageSet(path.name, shape[0], batches, lambda: fingerprint)


def _npz_members(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except FileNotFoundError as error:
        raise EvaluationError(f"There is no {path}; give an existing .npz file.") from error
    except (OSError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"{path} is no readable .npz file ({error}); write it again.") from error


def _npy_header(stream: Any, path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(stream)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = reader(stream)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"'arr_0' of {path} is no array ({error}); write the file again.") from error
    if fortran_order:
        raise EvaluationError(f"'arr_0' of {path} is in Fortran order; save numpy.ascontiguousarray of it.")
    return shape, dtype


def network_device(network: FeatureNetwork) -> torch.device:
    """Return the device that the network's weights are on."""
    if isinstance(network, torch.nn.Module):
        tensor = next(network.parameters(), None)
        if tensor is not None:
            return tensor.device
    return torch.device("cpu")


def _progress_bar(shown: bool) -> Any:
    if not shown:
        return nullcontext()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
