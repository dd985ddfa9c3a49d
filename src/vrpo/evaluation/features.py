"""From images to features, batch by batch: one vector for each image, and Inception's spatial features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from vrpo.errors import EvaluationError
from vrpo.evaluation.images import ImageLike, ImageSet, open_images


class FeatureNetwork(Protocol):
    """What evaluation needs of a frozen network; `vrpo.vision.encoders.load_feature_network` gives one."""

    name: str
    weights_hash: str
    input_size: int

    def pooled(self, images: Tensor) -> Tensor:
        """Return float32 features (B, D) of uint8 images (B, 3, H, W)."""


@runtime_checkable
class InceptionLike(Protocol):
    """What sFID and IS need beyond that; `vrpo.vision.inception.InceptionNetwork` has it."""

    def pooled_and_spatial(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pooled features and the spatial ones (B, S), float32, of uint8 images."""

    def logits(self, pooled: Tensor) -> Tensor:
        """Return unbiased class logits (B, C) of pooled features."""


class Features(NamedTuple):
    """Float32 features of a batch on the CPU: (B, D), and (B, S) of a network that is `InceptionLike`."""

    pooled: Tensor
    spatial: Tensor | None


def feature_batches(
    images: ImageSet, network: FeatureNetwork, *, batch_size: int = 64, progress: bool = False
) -> Iterator[Features]:
    """Yield features batch by batch in the order of the images.

    Raises EvaluationError where the network returns NaN or infinity.
    """
    device = network_device(network)
    done = 0
    with _progress_bar(progress) as bar:
        task = bar.add_task(f"features of {images.name}", total=images.count) if bar else None
        for batch in images.batches(batch_size):
            spatial: Tensor | None = None
            if isinstance(network, InceptionLike):
                pooled, spatial = network.pooled_and_spatial(batch.to(device))
                spatial = spatial.float().cpu()
            else:
                pooled = network.pooled(batch.to(device))
            features = Features(pooled.float().cpu(), spatial)
            if not all(torch.isfinite(part).all() for part in features if part is not None):
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
    """Return the pooled features of all images, float32 (N, D)."""
    images = open_images(source)
    matrix = FeatureMatrix(images.count)
    for features in feature_batches(images, network, batch_size=batch_size, progress=progress):
        matrix.append(features.pooled)
    return matrix.rows(images.name)


class FeatureMatrix:
    """Feature vectors of a known number of images, filled in order without a second copy."""

    def __init__(self, count: int) -> None:
        self._count, self._done = count, 0
        self._matrix: Tensor | None = None

    def append(self, features: Tensor) -> None:
        """Add the next rows (B, D)."""
        if self._matrix is None:
            self._matrix = torch.empty(self._count, features.shape[1])
        self._matrix[self._done : self._done + len(features)] = features
        self._done += len(features)

    def rows(self, name: str) -> Tensor:
        """Return the whole matrix (N, D); raises EvaluationError where there are no images in ``name``."""
        if self._matrix is None:
            raise EvaluationError(f"There are no images in {name}; give at least one.")
        return self._matrix


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

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
