"""What a run measured: scores by protocol, and what the training cost."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from vrpo.evaluation.protocol import METRIC_NAMES, metric_label, network_label
from vrpo.evaluation.protocol import Protocol as Recorded
from vrpo.report.curves import Curve
from vrpo.runs import Record, Run, flatten, number

_LOWER_IS_BETTER = {"fd", "fid", "sfid", "kid", "denoising"}
# Beside those that `vrpo evaluate` computes.
_OTHER_NAMES = {
    "fid": "FID",
    "inception_score": "IS",
    "cknna": "CKNNA",
    "denoising": "Held-out loss",
    "alignment": "Held-out alignment",
}
# What says where the samples came from, not how they were scored.
_NOT_PROTOCOL = {"seed", "run", "checkpoint", "step", "seconds", "images_seen", "file", "date", "device"}


@dataclass(frozen=True)
class Protocol:
    """How scores were obtained; scores of different protocols are never compared.

    ``key`` identifies it (canonical JSON), ``text`` says it in one line, ``features`` is the short name of
    the feature network and ``architecture`` its full one, both empty for losses on ``held_out`` images.
    """

    key: str
    text: str = field(compare=False)
    features: str = field(compare=False)
    held_out: bool = False
    weights_hash: str = field(default="", compare=False)
    architecture: str = field(default="", compare=False)

    @classmethod
    def of(cls, items: Mapping[str, Any], features: str = "", held_out: bool = False) -> Protocol:
        """Make the protocol of these entries."""
        text = " · ".join(f"{name.replace('_', ' ')}: {_plain(value)}" for name, value in items.items())
        return cls(json.dumps(items, sort_keys=True, default=str), text, features, held_out)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return "–".join(_plain(item) for item in value)
    if isinstance(value, str) and len(value) >= 40 and all(c in "0123456789abcdef" for c in value.lower()):
        return value[:12]  # a hash is told apart by its first digits
    return "none" if value is None else str(value)


def evaluation_protocol(record: Record) -> Protocol:
    """Return the protocol of an evaluation record, without what only says where its samples came from."""
    given = record.get("protocol")
    items = flatten(given) if isinstance(given, Mapping) else {"protocol": given}
    items = {
        key: value
        for key, value in items.items()
        if key.split(".")[-1] not in _NOT_PROTOCOL and value not in (None, {})
    }
    names = ("features.name", "features", "feature_network")
    features = str(next((items[key] for key in names if key in items), ""))
    protocol = Protocol.of(items, network_label(PurePath(features).name if "/" in features else features))
    try:
        text = Recorded.from_dict({**given, "seed": None}).line() if isinstance(given, Mapping) else ""
    except (TypeError, LookupError, AttributeError, ValueError, ArithmeticError):  # scored by another program
        text = ""
    return replace(
        protocol,
        text=text or protocol.text,
        weights_hash=str(items.get("features.weights_hash", "")),
        architecture=str(items.get("features.architecture", features)),
    )


def held_out_protocol(run: Run) -> Protocol:
    """Return the protocol of a run's held-out loss: which data, which loss, which noise."""
    config, data = flatten(run.config), run.info.get("data", {})
    path = config.get("data.validation")
    told = run.info.get("held_out", {}).get("fingerprint") or (PurePath(str(path)).name if path else None)
    items = {
        "score": "denoising loss of the EMA weights on held-out images, noise and times fixed",
        "loss": str(config.get("model.name", "")).split("-")[0] or None,
        "path": config.get("diffusion.path"),
        "times": config.get("diffusion.time"),
        "images": config.get("train.validation_images"),
        "validation": told,
        "trained_on": data.get("fingerprint"),
    }
    return Protocol.of({key: value for key, value in items.items() if value is not None}, held_out=True)


@dataclass(frozen=True)
class Measure:
    """One score under one protocol."""

    protocol: Protocol
    metric: str

    @property
    def lower_is_better(self) -> bool:
        """Whether smaller values are better, so that a speed-up can be told."""
        return self.metric.lower() in _LOWER_IS_BETTER

    @property
    def label(self) -> str:
        """The score's name; what depends on a feature network is named after it."""
        metric = self.metric.lower()
        if metric in METRIC_NAMES:
            return metric_label(metric, self.protocol.architecture)
        return _OTHER_NAMES.get(metric, self.metric)


def measure_curves(run: Run) -> dict[Measure, Curve]:
    """Return every score of a run against images and seconds, in the order of first measurement.

    Where samples of several seeds were scored at one time, the score is their mean; of one seed the newest counts.
    """
    points: dict[Measure, dict[float, dict[str, tuple[float, float]]]] = {}

    def add(measure: Measure, record: Record, value: object, seeds: str = "") -> None:
        score, images = number(value), number(record.get("images"))
        if math.isfinite(score) and math.isfinite(images):
            of_seed = points.setdefault(measure, {}).setdefault(images, {})
            of_seed[seeds] = (number(record.get("seconds")), score)

    for record in run.evaluations:
        protocol, seeds = evaluation_protocol(record), _seeds(record)
        for metric, value in record["metrics"].items():
            add(Measure(protocol, metric), record, value, seeds)
    held_out = held_out_protocol(run)
    for record in run.metrics("validation"):
        for metric in ("denoising", "alignment"):
            add(Measure(held_out, metric), record, record.get(metric))
    curves = {}
    for measure, by_images in points.items():
        images = tuple(sorted(by_images))
        found = [zip(*by_images[position].values(), strict=True) for position in images]
        seconds, scores = zip(*([statistics.fmean(values) for values in pair] for pair in found), strict=True)
        curves[measure] = Curve(images, seconds, scores)
    return curves


def _seeds(record: Record) -> str:
    """Return what an evaluation's protocol says of seeds, which is all that may differ within a measure."""
    given = record.get("protocol")
    items = flatten(given) if isinstance(given, Mapping) else {}
    return str(sorted((key, str(value)) for key, value in items.items() if key.split(".")[-1] == "seed"))


@dataclass(frozen=True)
class Cost:
    """What training took; None where it was not logged.

    Shares are of the training time, 0 to 1: in the objective, in the encoders that make its targets, and
    waiting for data. Memory is the peak in MB; ``skipped`` counts non-finite steps.
    """

    images: float | None
    seconds: float | None
    images_per_second: float | None
    objective_share: float | None
    target_share: float | None
    memory_mb: float | None
    data_wait: float | None
    skipped: float | None


def training_cost(run: Run) -> Cost:
    """Summarise a run's cost; speed is the median of all records but the first, which holds the start-up."""
    records = run.metrics("train")

    def values(key: str, rows: list[Record]) -> list[float]:
        return [value for value in (number(row.get(key)) for row in rows) if math.isfinite(value)]

    def last(key: str) -> float | None:
        found = values(key, records)
        return max(found) if found else None

    steady = records[1:] or records
    speed = values("images_per_second", steady)

    def mean(key: str) -> float | None:
        found = values(key, steady)
        return statistics.fmean(found) if found else None

    return Cost(
        images=last("images"),
        seconds=last("seconds"),
        images_per_second=statistics.median(speed) if speed else None,
        objective_share=mean("objective_share"),
        target_share=mean("target_share"),
        memory_mb=last("memory_mb"),
        data_wait=mean("data_wait"),
        skipped=last("skipped"),
    )
