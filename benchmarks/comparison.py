"""From finished runs to one record each, and from records to means, intervals and paired differences."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from variants import Variant
from vrpo.config import RunConfig
from vrpo.report.curves import Interval, interval
from vrpo.report.formats import score as print_score
from vrpo.report.formats import with_interval
from vrpo.report.measures import measure_curves, number, training_cost
from vrpo.runs import Run, flatten

COSTS = ("seconds", "images_per_second", "memory_mb", "objective_share", "target_share", "data_wait")
FACTS = ("vrpo", "torch", "machine", "device", "parameters", "encoders")

# A score's label, and its protocol as JSON.
Key = tuple[str, str]


def run_record(folder: Path, variant: Variant, seed: int) -> dict[str, Any]:
    """Return what a finished run measured: its scores with their protocols and curves, and its cost."""
    run = Run(folder)
    cost = dataclasses.asdict(training_cost(run))
    aligned = [record["alignment"] for record in run.metrics("train") if record.get("alignment") is not None]
    return {
        "variant": variant.name,
        "about": variant.about,
        "objective": variant.objective,
        "changes": variant.changes,
        "seed": seed,
        "config": chosen(run.config),
        "images": cost.pop("images"),
        **cost,
        "training_alignment": aligned[-1] if aligned else None,
        "scores": [
            {
                "measure": measure.label,
                "metric": measure.metric,
                "features": measure.protocol.features,
                "value": curve.scores[-1],
                "lower_is_better": measure.lower_is_better,
                "protocol": json.loads(measure.protocol.key),
                "protocol_line": measure.protocol.text,
                "curve": {
                    "images": curve.images,
                    "seconds": [second if math.isfinite(second) else None for second in curve.seconds],
                    "values": curve.scores,
                },
            }
            for measure, curve in measure_curves(run).items()
        ],
        **{name: run.info.get(name) for name in FACTS},
        "data": {key: value for key, value in (run.info.get("data") or {}).items() if key != "path"},
    }


def chosen(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a configuration has beside the defaults, by dotted key; of a file or folder its name alone."""
    usual = flatten(RunConfig().model_dump(mode="json"))
    return {
        key: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        for key, value in flatten(config).items()
        if key not in ("name", "seed") and usual.get(key) != value
    }


def summarise(records: Sequence[dict[str, Any]], baseline: str) -> dict[str, Any]:
    """Return mean and Student's 95% interval of every score by variant, and its difference to the baseline by seed.

    Scores of different protocols are never brought together. A half-width is null where there is one value.
    """
    names = dict.fromkeys([baseline, *(record["variant"] for record in records)])
    of = {name: [record for record in records if record["variant"] == name] for name in names}
    scored = [score for record in records for score in record["scores"]]
    labels, lines = _labels(scored), {_key(score): score["protocol_line"] for score in scored}
    variants = []
    for name, own in of.items():
        if not own:
            continue
        scores = {}
        for key, label in labels.items():
            values = _by_seed(own, key)
            if not values:
                continue
            reference = _by_seed(of[baseline], key)
            paired = [values[seed] - reference[seed] for seed in values if seed in reference]
            scores[label] = {
                **dataclasses.asdict(interval(list(values.values()))),
                "by_seed": values,
                "difference": dataclasses.asdict(interval(paired)) if paired and name != baseline else None,
            }
        costs = {key: [value for record in own if (value := record[key]) is not None] for key in COSTS}
        variants.append(
            {
                **{key: own[0][key] for key in ("variant", "about", "objective", "changes")},
                "seeds": [record["seed"] for record in own],
                "cost": {key: math.fsum(values) / len(values) if values else None for key, values in costs.items()},
                "scores": scores,
            }
        )
    return {
        "baseline": baseline,
        "protocols": {label: lines[key] for key, label in labels.items()},
        "variants": variants,
    }


def _key(score: dict[str, Any]) -> Key:
    return score["measure"], json.dumps(score["protocol"], sort_keys=True)


def _by_seed(records: Sequence[dict[str, Any]], key: Key) -> dict[int, float]:
    found = {record["seed"]: score["value"] for record in records for score in record["scores"] if _key(score) == key}
    return {seed: value for seed, value in found.items() if math.isfinite(number(value))}


def _labels(scores: Iterable[dict[str, Any]]) -> dict[Key, str]:
    """Name each score by its measure; where several protocols have the same, by its network, then by a number."""
    labels: dict[Key, str] = {}
    for score in scores:
        measure, features = score["measure"], score["features"]
        if _key(score) in labels:
            continue
        label = f"{measure} ({features})" if measure in labels.values() and features else measure
        count = 2
        while label in labels.values():
            label, count = f"{measure} ({count})", count + 1
        labels[_key(score)] = label
    return labels


def summary_table(summary: dict[str, Any]) -> str:
    """Return the summary as a markdown table, its protocols below."""
    settings, measures = summary["settings"], list(summary["protocols"])
    lines = [
        f"{settings['images']:,} images a run, preset {settings['preset']}, {len(settings['seeds'])} seeds; mean ± 95% "
        f"interval, and in brackets the difference to {summary['baseline']}, paired by seed. "
        f"{settings['jobs']} runs side by side, {settings['threads_each']} threads each, on "
        f"{settings['machine']['device']}.",
        "",
        f"| variant | seeds | {' | '.join(measures)} | images/s | seconds |",
        f"|---|--:|{'--:|' * (len(measures) + 2)}",
    ]
    for variant in summary["variants"]:
        cells = [_cell(variant["scores"].get(measure)) for measure in measures]
        cost = variant["cost"]
        times = (print_score(cost["images_per_second"]), print_score(cost["seconds"], 0))
        lines.append(f"| {' | '.join([variant['variant'], str(len(variant['seeds'])), *cells, *times])} |")
    alike: dict[str, list[str]] = {}
    for measure, line in summary["protocols"].items():
        alike.setdefault(line, []).append(measure)
    lines += ["", *(f"- {', '.join(measures)}: {line}" for line, measures in alike.items())]
    lines += [f"- Failed: {title}: {reason}" for title, reason in summary["failed"].items()]
    return "\n".join(lines)


def _cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return print_score(None)
    text = with_interval(Interval(score["mean"], score["half_width"], score["n"]))
    if score["difference"] is None:
        return text
    return f"{text} ({with_interval(Interval(**score['difference']), sign=True)})"
