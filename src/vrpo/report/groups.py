"""Runs that differ only in their seed, grouped and labelled, and what else differs between the groups."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import Any

from vrpo.errors import DataError, nearest
from vrpo.evaluation.protocol import network_label
from vrpo.free_keys import ENCODER_WEIGHTS, is_free
from vrpo.report import formats
from vrpo.report.curves import Curve
from vrpo.report.measures import Cost, Measure, Protocol, measure_curves, training_cost
from vrpo.runs import Run, flatten

# Where a run is written and what it is called do not make it another experiment.
_PLACES = {"name", "out", "output", "output_dir", "run_dir", "resume"}
# Free to move, but told by a fingerprint: another one makes another experiment.
_TOLD = re.compile(rf"data\.(path|validation)|{ENCODER_WEIGHTS.pattern}")
# What changes how fast weights are found, though not which.
_SPEED = ("train.compile", "train.parallel", "train.shard_size")
_ENCODERS = r"(encoder|more_encoders\.\d+)\.(name|weights)"
_IMAGE_NETWORK = r"align\.perceptual_image\.(network|network_weights|linear_weights)"
_OBJECTIVE_SECTIONS = ("align.", "encoder.", "more_encoders.")


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed."""

    label: str
    objective: str
    runs: tuple[Run, ...]

    @cached_property
    def curves(self) -> tuple[dict[Measure, Curve], ...]:
        """The measured curves of each run, in the order of ``runs``."""
        return tuple(measure_curves(run) for run in self.runs)

    @cached_property
    def costs(self) -> tuple[Cost, ...]:
        """What each run's training took, in the order of ``runs``."""
        return tuple(training_cost(run) for run in self.runs)

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """The runs' seeds, in the order of ``runs``."""
        return tuple(run.seed for run in self.runs)

    def curves_of(self, measure: Measure) -> dict[int | None, Curve]:
        """Return the curves of one measure by seed, for the runs that have it."""
        return {
            seed: curves[measure] for seed, curves in zip(self.seeds, self.curves, strict=True) if measure in curves
        }

    def cost(self, name: str) -> float | None:
        """Return the mean over seeds of one entry of the cost, None where no run logged it."""
        values = [value for cost in self.costs if (value := getattr(cost, name)) is not None]
        return math.fsum(values) / len(values) if values else None


def experiment_settings(run: Run) -> dict[str, Any]:
    """Return a run's configuration without seeds, names and output places.

    Data sets and networks are known by fingerprint where the run recorded one, not by where they lie.
    """
    leaves = {
        key: value for key, value in flatten(run.config).items() if key not in _PLACES and key.split(".")[-1] != "seed"
    }
    facts = run.info
    for key, name in (("data.path", "data"), ("data.validation", "held_out")):
        if key in leaves and (fingerprint := facts.get(name, {}).get("fingerprint")):
            leaves[key] = f"data {str(fingerprint)[:12]}"
    if "encoders" in facts:
        told = [_weights(fingerprint) for fingerprint in facts["encoders"]]
        _tell(leaves, _ENCODERS, told)
    if "image_distance" in facts:
        _tell(leaves, _IMAGE_NETWORK, [_weights(facts["image_distance"])])
    return leaves


def _tell(leaves: dict[str, Any], network: str, told: Sequence[str]) -> None:
    """Replace the places of networks and of their weights by what tells them."""
    for key in [key for key in leaves if re.fullmatch(network, key)]:
        if key.endswith("weights"):
            del leaves[key]
        elif isinstance(leaves[key], str) and PurePath(leaves[key]).is_absolute():
            leaves[key] = PurePath(leaves[key]).name
    section = "align.perceptual_image.network_weights" if network == _IMAGE_NETWORK else "encoder.weights"
    if told:
        leaves[section] = ", ".join(told)


def _weights(fingerprint: object) -> str:
    found = re.search(r"weights=([0-9a-f]+)", str(fingerprint))
    return f"weights {found[1][:12]}" if found else str(fingerprint)[:60]


def identity(run: Run) -> dict[str, Any]:
    """Return what makes a run the experiment it is: all its settings but those that shape no weights."""
    return {key: value for key, value in experiment_settings(run).items() if _shapes(key)}


def _shapes(key: str) -> bool:
    return _TOLD.fullmatch(key) is not None or not is_free(key)


def group_runs(runs: Sequence[Run]) -> tuple[tuple[Group, ...], list[str]]:
    """Group runs that differ only in seed, and say which runs repeat another's seed."""
    members: dict[str, list[Run]] = {}
    repeated = []
    for run in runs:
        key = repr([run.objective, sorted(identity(run).items())])
        same = members.setdefault(key, [])
        if run.seed in [other.seed for other in same]:
            repeated.append(f"{run.path.name} repeats another run's configuration and seed and is left out.")
        else:
            same.append(run)
    return tuple(_labelled(list(members.values()))), repeated


def composition(run: Run) -> str:
    """Return the objective and what acts inside the trunk beside it, such as "vrpo + scaffold + token policy"."""
    keys, objective = flatten(run.config), run.objective
    supply, token = keys.get("align.scaffold.supply", "auto"), keys.get("align.token.use")
    parts = [objective]
    if supply == "advantage" or (supply == "clock" and objective != "repi"):
        parts.append("scaffold" if supply == "advantage" else "clock scaffold")
    if keys.get("align.token.tau") is not None and (token or (token is None and objective == "reg")):
        parts.append("token policy")
    elif token and objective != "reg":
        parts.append("token")
    return " + ".join(parts)


def _labelled(members: list[list[Run]]) -> list[Group]:
    groups: list[Group] = []
    for runs in members:
        objective, named = runs[0].objective, composition(runs[0])
        rivals = [identity(other[0]) for other in members if composition(other[0]) == named]
        details = []
        for key, value in identity(runs[0]).items():
            usual = Counter(repr(rival.get(key)) for rival in rivals).most_common(1)[0][0]
            if repr(value) != usual:
                details.append(f"{key.split('.')[-1].replace('_', ' ')} {formats.plain(value)}")
        label = f"{named} ({', '.join(details)})" if 0 < len(details) <= 2 else named
        taken = {group.label for group in groups}
        for candidate in (label, f"{named} ({runs[0].name})", f"{named} ({runs[0].path.name})"):
            label = candidate
            if candidate not in taken and not (candidate == named and details):
                break
        while label in taken:
            label += "'"
        groups.append(Group(label, objective, tuple(sorted(runs, key=lambda run: run.seed or 0))))
    return groups


def choose_baseline(groups: Sequence[Group], wanted: str | None) -> Group:
    """Return the group that others are compared to: the wanted one, else none, else repa, else the first.

    Raises DataError for a label or objective that is not there.
    """
    for name in (wanted,) if wanted else ("none", "repa"):
        for group in groups:
            if name in (group.label, group.objective):
                return group
    if wanted:
        labels = [group.label for group in groups]
        raise DataError(f"no run to serve as baseline '{wanted}': {nearest(wanted, labels)}")
    return groups[0]


def config_differences(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """Return each setting of the experiments or of their speed that differs, with every group's value by label."""
    trees = {}
    for group in groups:
        settings = experiment_settings(group.runs[0])
        trees[group.label] = {key: value for key, value in settings.items() if key in _SPEED or _shapes(key)}
    keys = dict.fromkeys(key for tree in trees.values() for key in tree)
    return {
        key: {label: tree.get(key) for label, tree in trees.items()}
        for key in keys
        if len({repr(tree.get(key)) for tree in trees.values()}) > 1
    }


def is_circular(protocol: Protocol, groups: Sequence[Group]) -> bool:
    """Whether a protocol scores in a network through which some group was trained: aligned to it, or by its distance.

    Networks are told apart by the hash of their weights where the run recorded it, else by name.
    """
    return bool(protocol.features) and any(_trained_through(protocol, group.runs[0]) for group in groups)


def _trained_through(protocol: Protocol, run: Run) -> bool:
    config, facts = flatten(run.config), run.info
    image = [facts["image_distance"]] if "image_distance" in facts else []
    compares = config.get("align.perceptual_image.kind", "none") != "none"
    for recorded, used, keys in (
        (facts.get("encoders"), run.objective != "none", _ENCODERS),
        (image, compares, _IMAGE_NETWORK),
    ):
        if recorded and protocol.weights_hash:
            if any(f"weights={protocol.weights_hash}" in str(item) for item in recorded):
                return True
        elif used:
            values = [value for key, value in config.items() if re.fullmatch(keys, key) and isinstance(value, str)]
            if protocol.features in {network_label(PurePath(value).name) for value in values}:
                return True
    return False


def beyond_objective(differences: dict[str, Any]) -> list[str]:
    """Return the differing keys that belong to neither the objective nor its encoder."""
    return [key for key in differences if not key.startswith(_OBJECTIVE_SECTIONS)]
