"""Scoring images against reference images: metrics in one feature network, with their protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vrpo.errors import EvaluationError, nearest
from vrpo.evaluation import kernel
from vrpo.evaluation.features import (
    FeatureMatrix,
    FeatureNetwork,
    Features,
    InceptionLike,
    feature_batches,
    network_device,
)
from vrpo.evaluation.frechet import FeatureStatistics, frechet_distance
from vrpo.evaluation.images import ImageLike, ImageSet, open_images
from vrpo.evaluation.inception_score import InceptionScore
from vrpo.evaluation.precision_recall import NEIGHBOURS, precision_recall
from vrpo.evaluation.protocol import FeaturesRecord, Protocol, metric_label
from vrpo.evaluation.reference import Reference, load_reference
from vrpo.files import write_text
from vrpo.untrusted import printable
from vrpo.wording import counted

if TYPE_CHECKING:
    from rich.console import RenderableType

METRICS = ("fd", "sfid", "is", "kid", "precision", "recall")
# The columns of an ADM table, and what any other network can give.
ADM_METRICS = ("fd", "sfid", "is", "precision", "recall")
ANY_METRICS = ("fd", "kid", "precision", "recall")
_OF_INCEPTION = {"sfid", "is"}
_OF_MANIFOLDS = {"precision", "recall"}


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics by key (some of ``METRICS``) and the protocol they belong to.

    ``deviations`` holds the standard deviation between subsets of metrics that are means over subsets.
    """

    metrics: dict[str, float]
    protocol: dict[str, Any]
    deviations: dict[str, float] = field(default_factory=dict)

    @property
    def protocol_line(self) -> str:
        """The protocol in one line."""
        return Protocol.from_dict(self.protocol).line()

    def labels(self) -> dict[str, str]:
        """Return the printed name of each metric."""
        architecture = self.protocol["features"]["architecture"]
        return {metric: metric_label(metric, architecture) for metric in self.metrics}

    def shown(self, metric: str) -> str:
        """Return a metric's value as text, with its deviation where it has one."""
        spread = f" ± {self.deviations[metric]:.2g}" if metric in self.deviations else ""
        return f"{self.metrics[metric]:.6g}{spread}"

    def record(self, **fields: Any) -> dict[str, Any]:
        """Return what is written as JSON: further ``fields`` (such as the step), metrics and protocol."""
        return {**fields, "metrics": self.metrics, "deviations": self.deviations, "protocol": self.protocol}

    def save(self, path: Path | str, **fields: Any) -> None:
        """Write `record` as JSON, whole or not at all."""
        write_json(Path(path), self.record(**fields))

    def table(self) -> RenderableType:
        """Return a rich table of the metrics with the protocol below it."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("metric", "value")
        table.columns[1].justify = "right"
        for metric, label in self.labels().items():
            table.add_row(label, self.shown(metric))
        return Group(table, Text(f"Protocol: {self.protocol_line}"))


def results_table(results: Mapping[str, EvaluationResult]) -> RenderableType:
    """Return a rich table of several results by the name of what was scored, and each protocol once below it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    first = next(iter(results.values()))
    table = Table("images", *first.labels().values())
    for column in table.columns[1:]:
        column.justify = "right"
    lines: dict[str, list[str]] = {}
    for name, result in results.items():
        table.add_row(Text(printable(name)), *(result.shown(metric) for metric in result.metrics))
        lines.setdefault(result.protocol_line, []).append(name)
    whose = "" if len(lines) == 1 else " of {}"
    texts = [Text(printable(f"Protocol{whose.format(', '.join(names))}: {line}")) for line, names in lines.items()]
    return Group(table, *texts)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def chosen_metrics(metrics: Sequence[str] | None, network: FeatureNetwork) -> tuple[str, ...]:
    """Return ``metrics`` in their printed order; None stands for all that the network's field reports.

    Raises EvaluationError for an unknown one, or one that only Inception has.
    """
    inception = isinstance(network, InceptionLike)
    if metrics is None:
        return ADM_METRICS if inception else ANY_METRICS
    for metric in metrics:
        if metric not in METRICS:
            raise EvaluationError(f"There is no metric '{metric}': {nearest(metric, METRICS)}")
        if metric in _OF_INCEPTION and not inception:
            raise EvaluationError(
                f"The metric '{metric}' is of the Inception network alone, not of {network.name}: leave it out, or "
                "take the features of inception."
            )
    return tuple(metric for metric in METRICS if metric in metrics)


def least_images(metrics: Sequence[str]) -> int:
    """Return how many images ``metrics`` need on each side."""
    return NEIGHBOURS + 1 if _OF_MANIFOLDS & set(metrics) else 2


def evaluate_images(
    samples: ImageLike,
    reference: ImageLike | Reference,
    network: FeatureNetwork,
    *,
    metrics: Sequence[str] | None = None,
    protocol_fields: Mapping[str, Any] | None = None,
    seed: int = kernel.SEED,
    cache: Path | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> EvaluationResult:
    """Score images against reference images by features of a frozen network.

    Args:
        samples: images as `vrpo.evaluation.images.open_images` takes them.
        reference: images likewise, or a `Reference` from `load_reference`; its moments use all images, its
            manifold and KID at most 10,000.
        network: from `vrpo.vision.encoders.load_feature_network`.
        metrics: some of ``METRICS``; None: those usual for the network.
        protocol_fields: how the samples were made: the optional fields of `Protocol`.
        seed: of KID's subsets.
        cache: folder for reference features, in place of the one beside the images.
        batch_size: images in one pass of the network.
        progress: show a bar on the standard error stream.

    Raises:
        EvaluationError: unknown metric, too few images, NaN features, or images that cannot be read.
    """
    metrics = chosen_metrics(metrics, network)
    images = open_images(samples)
    if images.count < least_images(metrics):
        there = "There is 1 sample" if images.count == 1 else f"There are {images.count} samples"
        need = f"{' and '.join(metrics)} {'needs' if len(metrics) == 1 else 'need'}"
        raise EvaluationError(
            f"{there} in {images.name} and {need} at least {least_images(metrics)}; sample more images."
        )
    against = load_reference(reference, network, cache=cache, batch_size=batch_size, progress=progress)
    check_reference(against, metrics)
    measures = _Measures(images, metrics, network)
    for batch in feature_batches(images, network, batch_size=batch_size, progress=progress):
        measures.add(batch)
    values, deviations, settings = measures.finish(against, seed)
    fields = dict(protocol_fields or {})
    if fields.get("guidance_interval") is not None:
        fields["guidance_interval"] = tuple(fields["guidance_interval"])
    protocol = Protocol(images.count, against.record, FeaturesRecord.of(network), **fields, **settings)
    return EvaluationResult({metric: values[metric] for metric in metrics}, protocol.to_dict(), deviations)


def check_reference(reference: Reference, metrics: Sequence[str]) -> None:
    """Raise EvaluationError where a reference lacks what ``metrics`` need."""
    name = reference.record.name
    needing = [metric for metric in metrics if metric in _OF_MANIFOLDS | {"kid"}]
    vectors = reference.vectors
    if needing and vectors is None:
        need, them = ("needs", "it") if len(needing) == 1 else ("need", "them")
        raise EvaluationError(
            f"The reference {name} holds only the mean and covariance of features, and {', '.join(needing)} {need} "
            f"images; give the images, or leave {them} out."
        )
    if needing and vectors is not None and len(vectors) < least_images(metrics):
        raise EvaluationError(
            f"The reference {name} holds {counted(len(vectors), 'image', 'images')}, too few for {', '.join(metrics)}; "
            f"give at least {least_images(metrics)}."
        )
    if "sfid" in metrics and reference.spatial is None:
        raise EvaluationError(
            f"The reference {name} holds no spatial moments ('mu_s' and 'sigma_s'); give the images, or leave sfid out."
        )


class _Measures:
    """What the metrics need of the samples, gathered batch by batch."""

    def __init__(self, images: ImageSet, metrics: Sequence[str], network: FeatureNetwork) -> None:
        self._images, self._metrics, self._network = images, metrics, network
        self._moments, self._spatial, self._score = FeatureStatistics(), FeatureStatistics(), InceptionScore()
        self._matrix = FeatureMatrix(images.count)
        self._done = 0

    def add(self, batch: Features) -> None:
        """Take the features of the next images."""
        if "fd" in self._metrics:
            self._moments.update(batch.pooled)
        if "sfid" in self._metrics and batch.spatial is not None:
            self._spatial.update(batch.spatial)
        if "is" in self._metrics and isinstance(self._network, InceptionLike):
            self._score.update(self._network.logits(batch.pooled), self._done)
        if {"kid", *_OF_MANIFOLDS} & set(self._metrics):
            self._matrix.append(batch.pooled)
        self._done += len(batch.pooled)

    def finish(self, against: Reference, seed: int) -> tuple[dict[str, float], dict[str, float], dict[str, Any]]:
        """Return values, deviations and the settings that belong to the protocol."""
        values: dict[str, float] = {}
        deviations: dict[str, float] = {}
        settings: dict[str, Any] = {}
        if "fd" in self._metrics:
            values["fd"] = frechet_distance(self._moments, against.statistics)
        if "sfid" in self._metrics and against.spatial is not None:
            values["sfid"] = frechet_distance(self._spatial, against.spatial)
        if "is" in self._metrics:
            values["is"], deviations["is"] = self._score.mean, self._score.std
            settings["inception_score"] = {"chunk": self._score.chunk, "chunks": len(self._score.scores)}
        if against.vectors is None:
            return values, deviations, settings
        if "kid" in self._metrics:
            features = self._matrix.rows(self._images.name)
            size = min(kernel.SUBSET_SIZE, len(features), len(against.vectors))
            distance = kernel.kernel_distance(features, against.vectors, subset_size=size, seed=seed)
            values["kid"], deviations["kid"] = distance
            settings["kid"] = {
                "subsets": kernel.SUBSETS,
                "subset_size": size,
                "seed": seed,
                "reference": len(against.vectors),
            }
        if _OF_MANIFOLDS & set(self._metrics):
            features = self._matrix.rows(self._images.name)
            cover = precision_recall(features, against.vectors, device=network_device(self._network))
            values |= cover._asdict()
            settings["manifold"] = {
                "samples": len(features),
                "reference": len(against.vectors),
                "neighbours": NEIGHBOURS,
            }
        return values, deviations, settings
