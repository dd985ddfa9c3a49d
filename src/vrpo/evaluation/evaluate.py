"""Scoring images against reference images: metrics in one feature network, with their protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vrpo.errors import EvaluationError, nearest
from vrpo.evaluation import kernel
from vrpo.evaluation.features import (
    FeatureNetwork,
    ImageLike,
    Reference,
    extract_features,
    load_reference,
    network_device,
    open_images,
)
from vrpo.evaluation.frechet import FeatureStatistics, frechet_distance
from vrpo.evaluation.precision_recall import NEIGHBOURS, precision_recall
from vrpo.evaluation.protocol import FeaturesRecord, Protocol, metric_label
from vrpo.files import write_text

if TYPE_CHECKING:
    from rich.console import RenderableType

METRICS = ("fd", "kid", "precision", "recall")


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics by key (``fd``, ``kid``, ``precision``, ``recall``) and the protocol they belong to.

    ``deviations`` holds the standard deviation between subsets of metrics that are means over subsets.
    """

    metrics: dict[str, float]
    protocol: dict[str, Any]
    deviations: dict[str, float] = field(default_factory=dict)

    @property
    def protocol_line(self) -> str:
        """The protocol in one line."""
        return Protocol.from_dict(self.protocol).line()

    def save(self, path: Path | str, **fields: Any) -> None:
        """Write metrics, protocol and further ``fields`` (such as the step) as JSON, whole or not at all."""
        content = {
            **fields,
            "metrics": self.metrics,
            "deviations": self.deviations,
            "protocol": self.protocol,
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def table(self) -> RenderableType:
        """Return a rich table of the metrics with the protocol below it."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        architecture = self.protocol["features"]["architecture"]
        table = Table("metric", "value")
        table.columns[1].justify = "right"
        for metric, value in self.metrics.items():
            spread = f" ± {self.deviations[metric]:.2g}" if metric in self.deviations else ""
            table.add_row(metric_label(metric, architecture), f"{value:.6g}{spread}")
        return Group(table, Text(f"Protocol: {self.protocol_line}"))


def evaluate_images(
    samples: ImageLike,
    reference: ImageLike | Reference,
    network: FeatureNetwork,
    *,
    metrics: Sequence[str] = METRICS,
    protocol_fields: Mapping[str, Any] | None = None,
    seed: int = kernel.SEED,
    cache: Path | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> EvaluationResult:
    """Score images against reference images by features of a frozen network.

    Args:
        samples: images as `vrpo.evaluation.features.open_images` takes them.
        reference: images likewise, or a `Reference` from `load_reference`; its moments use all images, its
            manifold and KID at most 10,000.
        network: from `vrpo.vision.encoders.load_feature_network`.
        metrics: some of ``fd``, ``kid``, ``precision``, ``recall``.
        protocol_fields: how the samples were made: the optional fields of `Protocol`.
        seed: of KID's subsets.
        cache: folder for reference features of images that are not a prepared data set.
        batch_size: images in one pass of the network.
        progress: show a bar on the standard error stream.

    Raises:
        EvaluationError: unknown metric, too few images, NaN features, or images that cannot be read.
    """
    for metric in metrics:
        if metric not in METRICS:
            raise EvaluationError(f"There is no metric '{metric}': {nearest(metric, METRICS)}")
    images = open_images(samples)
    needed = NEIGHBOURS + 1 if {"precision", "recall"} & set(metrics) else 2
    if images.count < needed:
        raise EvaluationError(
            f"There are {images.count} samples in {images.name} and {' and '.join(metrics)} need at least "
            f"{needed}; sample more images."
        )
    against = load_reference(reference, network, cache=cache, batch_size=batch_size, progress=progress)
    features = extract_features(images, network, batch_size=batch_size, progress=progress)
    values: dict[str, float] = {}
    deviations: dict[str, float] = {}
    settings: dict[str, Any] = {}
    if "fd" in metrics:
        statistics = FeatureStatistics()
        statistics.update(features)
        values["fd"] = frechet_distance(statistics, against.statistics)
    if "kid" in metrics:
        vectors = _vectors(against, "KID")
        size = min(kernel.SUBSET_SIZE, len(features), len(vectors))
        distance = kernel.kernel_distance(features, vectors, subset_size=size, seed=seed)
        values["kid"], deviations["kid"] = distance
        settings["kid"] = {"subsets": kernel.SUBSETS, "subset_size": size, "seed": seed}
    if {"precision", "recall"} & set(metrics):
        vectors = _vectors(against, "Precision and recall")
        cover = precision_recall(features, vectors, device=network_device(network))
        values |= {name: value for name, value in cover._asdict().items() if name in metrics}
        settings["manifold"] = {
            "samples": len(features),
            "reference": len(vectors),
            "neighbours": NEIGHBOURS,
        }
    fields = dict(protocol_fields or {})
    if fields.get("guidance_interval") is not None:
        fields["guidance_interval"] = tuple(fields["guidance_interval"])
    protocol = Protocol(images.count, against.record, FeaturesRecord.of(network), **fields, **settings)
    return EvaluationResult(values, protocol.to_dict(), deviations)


def _vectors(reference: Reference, metric: str) -> torch.Tensor:
    if reference.vectors is None:
        raise EvaluationError(
            f"{metric} needs the reference images, and {reference.record.name} holds only their mean and "
            "covariance; give the images or ask for fd alone."
        )
    return reference.vectors
