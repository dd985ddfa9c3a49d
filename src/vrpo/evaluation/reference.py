"""What samples are compared with: features of reference images, kept beside their data, and ADM's own files."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vrpo.errors import EvaluationError
from vrpo.evaluation.features import FeatureNetwork, feature_batches
from vrpo.evaluation.frechet import MAX_WIDTH, FeatureStatistics
from vrpo.evaluation.images import ImageLike, ImageSet, open_images
from vrpo.evaluation.npz import Limit, npz_members, read_arrays
from vrpo.evaluation.protocol import INCEPTION, FeaturesRecord, ReferenceRecord
from vrpo.files import replacing

# The ADM suite compares manifolds with 10,000 reference images.
MANIFOLD_IMAGES = 10_000
_MANIFOLD_SEED = 0
# To be raised whenever a file and a network would give other features than before: decoding, resizing, pooling.
PREPROCESSING = 1
# Names of a distribution's mean and covariance in an ADM reference file, pooled and spatial.
POOLED = ("mu", "sigma")
SPATIAL = ("mu_s", "sigma_s")


@dataclass(frozen=True)
class Reference:
    """Features of reference images: moments of all, and vectors of at most 10,000 (None where not kept).

    ``spatial`` holds the moments of sFID's features, of the Inception network alone.
    """

    record: ReferenceRecord
    features: FeaturesRecord
    statistics: FeatureStatistics
    vectors: Tensor | None
    spatial: FeatureStatistics | None = None

    def save(self, path: Path | str) -> None:
        """Write an ``.npz`` that `load_reference` takes; its moments are named as in ADM's files."""
        fields: dict[str, object] = {"name": self.record.name, "fingerprint": self.record.fingerprint}
        fields |= {f"features_{name}": value for name, value in vars(self.features).items()}
        if self.vectors is not None:
            fields["vectors"] = self.vectors.numpy()
        if self.spatial is not None:
            fields |= dict(zip(SPATIAL, (self.spatial.mean, self.spatial.covariance), strict=True))
        self.statistics.save(path, **fields)


def load_reference(
    source: ImageLike | Reference,
    network: FeatureNetwork,
    *,
    cache: Path | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Reference:
    """Return the reference features of images, from the cache where they were computed before.

    The cache is the folder ``cache``, or ``features`` inside a prepared data set and ``NAME.features`` beside
    other images; its key holds the data's fingerprint, the network's name, weights, input size and precision,
    and the version of what is done to an image before the network sees it. A cache file is itself a valid
    source. An ADM reference file gives Inception its moments ``mu``, ``sigma``, ``mu_s``, ``sigma_s``, which
    are of more images than it holds, and its images ``arr_0`` for the manifold; any other network sees the
    images alone. Raises EvaluationError for features of another network.
    """
    features = FeaturesRecord.of(network)
    if isinstance(source, Reference):
        if source.features != features:
            raise _other_network(source.record.name, source.features.architecture, features)
        return source
    if isinstance(source, str | os.PathLike) and Path(source).suffix == ".npz":
        path = Path(source)
        members = npz_members(path)
        if set(POOLED) <= members.keys() and features.architecture == INCEPTION and "features_name" not in members:
            return _read_adm(path, members, network, features, cache, batch_size, progress)
        if set(POOLED) <= members.keys() and "arr_0" not in members:
            return _read_reference(path, features)
    return _of_images(open_images(source), network, features, cache, batch_size, progress)


def _of_images(
    images: ImageSet,
    network: FeatureNetwork,
    features: FeaturesRecord,
    cache: Path | None,
    batch_size: int,
    progress: bool,
) -> Reference:
    file = _cache_file(cache or images.folder, images, features)
    if file is not None and file.is_file():
        # A damaged file is replaced: the images are at hand.
        with suppress(EvaluationError):
            return _read_reference(file, features)
    chosen = _manifold_indices(images.count)
    statistics, spatial, parts, done = FeatureStatistics(), FeatureStatistics(), [], 0
    for batch in feature_batches(images, network, batch_size=batch_size, progress=progress):
        statistics.update(batch.pooled)
        if batch.spatial is not None:
            spatial.update(batch.spatial)
        first, last = np.searchsorted(chosen, (done, done + len(batch.pooled)))
        parts.append(batch.pooled[torch.from_numpy(chosen[first:last] - done)])
        done += len(batch.pooled)
    record = ReferenceRecord(images.name, images.count, images.fingerprint)
    reference = Reference(record, features, statistics, torch.cat(parts), spatial if spatial.width else None)
    if file is not None and images.count > 1:
        _keep(file, reference)
    return reference


def _manifold_indices(count: int) -> NDArray[np.int64]:
    """Ascending indices of the images that stand for the reference manifold, the same for every run."""
    if count <= MANIFOLD_IMAGES:
        return np.arange(count)
    return np.sort(np.random.RandomState(_MANIFOLD_SEED).choice(count, MANIFOLD_IMAGES, replace=False))


def _cache_file(folder: Path | None, images: ImageSet, features: FeaturesRecord) -> Path | None:
    if folder is None or not images.fingerprint:
        return None
    key = hashlib.sha256(repr((images.fingerprint, features, PREPROCESSING)).encode()).hexdigest()[:16]
    network = f"{features.architecture.replace('/', '-')}-{features.weights_hash[:8]}-{features.input_size}"
    return folder / f"{network}-{key}.npz"


def _keep(file: Path, reference: Reference) -> None:
    # A read-only or full disk costs the next evaluation time, not this one its result.
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as unfinished:
            reference.save(unfinished)


def _read_adm(
    path: Path,
    members: dict[str, int],
    network: FeatureNetwork,
    features: FeaturesRecord,
    cache: Path | None,
    batch_size: int,
    progress: bool,
) -> Reference:
    """Read an ADM file for Inception, whose statistics name no network because there is only that one."""
    digest = hashlib.sha256(repr(sorted(members.items())).encode()).hexdigest()
    record = ReferenceRecord(path.name, None, digest)
    statistics = FeatureStatistics.load(path)
    spatial = FeatureStatistics.load(path, SPATIAL) if set(SPATIAL) <= members.keys() else None
    reference = Reference(record, features, statistics, None, spatial)
    if "arr_0" not in members:
        return reference
    images = _of_images(open_images(path), network, features, cache, batch_size, progress)
    if images.statistics.width != statistics.width:
        raise EvaluationError(
            f"The 'mu' of {path.name} has {statistics.width} entries where {features.name} has "
            f"{images.statistics.width} features; give the images alone."
        )
    return replace(reference, vectors=images.vectors)


def _read_reference(file: Path, features: FeaturesRecord) -> Reference:
    statistics = FeatureStatistics.load(file)
    wanted = {f"features_{name}" for name in vars(features)}
    limits: dict[str, Limit] = dict.fromkeys((*wanted, "name", "fingerprint"), ())
    entries = read_arrays(file, {**limits, "vectors": (MANIFOLD_IMAGES, MAX_WIDTH)})
    spatial = FeatureStatistics.load(file, SPATIAL) if set(SPATIAL) <= npz_members(file).keys() else None
    if not wanted <= set(entries):
        raise EvaluationError(
            f"{file.name} does not say which feature network its 'mu' and 'sigma' belong to; give the images instead."
        )
    values = {name: entries[f"features_{name}"].item() for name in vars(features)}
    if FeaturesRecord(**values) != features:
        raise _other_network(file.name, values["architecture"], features)
    vectors = _read_vectors(entries["vectors"], statistics.width, file) if "vectors" in entries else None
    if vectors is not None and len(vectors) == statistics.count:
        # With every row at hand, a set smaller than its dimensions keeps its exact covariance factor.
        statistics = FeatureStatistics()
        statistics.update(vectors)
    record = ReferenceRecord(str(entries.get("name", file.name)), statistics.count, str(entries.get("fingerprint", "")))
    return Reference(record, features, statistics, vectors, spatial)


def _read_vectors(vectors: NDArray, width: int, file: Path) -> Tensor:
    if vectors.dtype != np.float32 or vectors.shape[1] != width or not np.isfinite(vectors).all():
        raise EvaluationError(f"'vectors' of {file} do not fit its 'mu'; give the images instead.")
    return torch.from_numpy(vectors)


def _other_network(name: str, architecture: str, features: FeaturesRecord) -> EvaluationError:
    return EvaluationError(
        f"The reference {name} holds features of {architecture} with other weights, input size or precision "
        f"than the {features.architecture} at {features.input_size} px asked for; give the images or use "
        "that network."
    )
