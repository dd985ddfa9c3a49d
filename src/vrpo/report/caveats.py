"""What a reader of a comparison must know before believing it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vrpo.report import formats
from vrpo.report.compare import Table
from vrpo.report.groups import Group, beyond_objective, is_circular
from vrpo.report.measures import Protocol
from vrpo.report.telemetry import dropped_rewards


def find_caveats(groups: Sequence[Group], tables: Sequence[Table], differences: dict[str, Any]) -> list[str]:
    """Return a sentence for each thing that weakens the comparison."""
    return [
        *_protocols(groups),
        *_circular(groups),
        *_budgets(groups, tables),
        *_setting(groups, differences),
        *_seeds(groups),
        *_health(groups),
    ]


def _protocols(groups: Sequence[Group]) -> list[str]:
    by_kind: dict[bool, list[set[Protocol]]] = {False: [], True: []}
    for group in groups:
        own = {measure.protocol for curves in group.curves for measure in curves}
        for held_out, sets in by_kind.items():
            if chosen := {protocol for protocol in own if protocol.held_out is held_out}:
                sets.append(chosen)
    found = []
    for held_out, sets in by_kind.items():
        if any(chosen != sets[0] for chosen in sets[1:]):
            what = "the held-out loss" if held_out else "samples"
            found.append(
                f"Not all runs were scored by the same protocol for {what}: scores of different protocols "
                "stand in separate tables and must not be compared."
            )
    missing = [g.label for g in groups if not any(m for c in g.curves for m in c if not m.protocol.held_out)]
    if by_kind[False] and missing:
        found.append(f"No evaluation of samples: {', '.join(missing)}.")
    elif missing:
        found.append("No run has an evaluation of samples: only the held-out loss is compared.")
    return found


def _circular(groups: Sequence[Group]) -> list[str]:
    protocols = {m.protocol: is_circular(m.protocol, groups) for g in groups for c in g.curves for m in c}
    features = {protocol.features for protocol in protocols} - {""}
    names = sorted({protocol.features for protocol, circular in protocols.items() if circular})
    if not names:
        return []
    if all(circular for protocol, circular in protocols.items() if protocol.features in features):
        return [
            f"Scored only in {', '.join(names)}, which runs were aligned to: this is circular; evaluate in a "
            "second feature network."
        ]
    return [f"Runs were aligned to {', '.join(names)}: scores in it are circular."]


def _budgets(groups: Sequence[Group], tables: Sequence[Table]) -> list[str]:
    found = []
    spans = {group.label: [cost.images for cost in group.costs if cost.images] for group in groups}
    every = [images for span in spans.values() for images in span]
    if every and max(every) > min(every):
        short = [label for label, span in spans.items() if span and min(span) < max(every)]
        found.append(
            f"The runs saw different numbers of images, {formats.count(min(every))} to "
            f"{formats.count(max(every))} (fewer: {', '.join(short)}): scores are at the largest common one."
        )
    for table in tables:
        apart = [measure.label for measure in table.measures if table.images[measure] is None]
        if apart:
            found.append(f"{', '.join(apart)}: not measured at a common number of images, each run's last is given.")
    return list(dict.fromkeys(found))


def _setting(groups: Sequence[Group], differences: dict[str, Any]) -> list[str]:
    found = []
    beyond = beyond_objective(differences)
    if beyond:
        found.append(f"More than the objective differs: {', '.join(beyond)}.")
    machines = {
        f"{run.info['machine']}, {run.info.get('device')}"
        for group in groups
        for run in group.runs
        if run.info.get("machine")
    }
    if len(machines) > 1:
        found.append("The runs were trained on different machines: their seconds cannot be compared.")
    return found


def _seeds(groups: Sequence[Group]) -> list[str]:
    few = min(len(group.runs) for group in groups)
    found = []
    if few == 1:
        found.append("One seed is no evidence: where a group has a single run there is no interval.")
    elif few < 3:
        found.append("Fewer than three seeds: the intervals are wide.")
    reference = set(groups[0].seeds)
    apart = [group.label for group in groups[1:] if not reference & set(group.seeds)]
    if apart:
        found.append(f"No seed in common with {groups[0].label}, so not paired: {', '.join(apart)}.")
    return found


def _health(groups: Sequence[Group]) -> list[str]:
    found = []
    for group in groups:
        for run, cost in zip(group.runs, group.costs, strict=True):
            name = f"{group.label}, seed {run.seed}" if len(group.runs) > 1 else group.label
            status = run.info.get("status")
            if status and status != "finished":
                found.append(f"{name}: training is not finished ({status}).")
            if cost.skipped:
                found.append(f"{name}: {formats.count(cost.skipped)} steps were skipped (not finite).")
            for key, lost in dropped_rewards(run).items():
                found.append(f"{name}: the reward {key} was not finite for {formats.count(lost)} tokens.")
            if run.damaged_lines:
                found.append(f"{name}: {run.damaged_lines} lines of metrics.jsonl could not be read.")
    return found
