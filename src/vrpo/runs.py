"""Reading a run's folder: configuration, facts, telemetry, samples, evaluations and checkpoints."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vrpo.errors import CheckpointError, DataError
from vrpo.untrusted import MAX_JSON_BYTES, MAX_YAML_BYTES, parse_json, parse_yaml, read_text, unseal, unseal_text

Record = dict[str, Any]

# Beyond it a number was not measured, and its square may be no number.
_LARGEST = 1e100


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a nested mapping by dotted name; a list is a leaf unless it holds mappings."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            leaves.update(flatten(value, f"{name}."))
        else:
            leaves[name] = value
    return leaves


@dataclass(frozen=True)
class SampleGrid:
    """One grid of samples: its file, when it was drawn, its layout, and the label of each image."""

    file: Path
    step: int
    images: int
    rows: int
    columns: int
    labels: list[Any]


class Run:
    """A folder made by ``vrpo train``, read lazily and never written.

    Raises DataError if the folder, its configuration or its facts cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "config.yaml").is_file():
            raise DataError(f"no run at {self.path}: give a folder made by vrpo train.")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration as nested dictionaries."""
        file = self.path / "config.yaml"
        try:
            tree = parse_yaml(unseal_text(read_text(file, MAX_YAML_BYTES)))
        except ValueError as error:
            raise DataError(
                f"{file} is not the YAML that the run wrote ({error}): restore it, or give another run's folder."
            ) from error
        if not isinstance(tree, dict):
            raise DataError(f"{file} holds no configuration: restore it, or give another run's folder.")
        return tree

    @cached_property
    def info(self) -> dict[str, Any]:
        """The run's facts (versions, machine, parameters, status, data); empty where none were written."""
        file = self.path / "run.json"
        if not file.is_file():
            return {}
        facts = _load_object(file)
        if facts is None or not _has_shape_of_facts(facts):
            raise DataError(f"{file} is not a JSON object or was damaged: remove it to read the run without its facts.")
        return facts

    @property
    def name(self) -> str:
        """The run's own name, or its folder's."""
        return str(self.info.get("name") or self.path.resolve().name)

    @property
    def objective(self) -> str:
        """The alignment objective's name; ``none`` where nothing says otherwise."""
        if self.info.get("objective"):
            return str(self.info["objective"])
        for section in ("align", "alignment", "objective"):
            value = self.config.get(section)
            if isinstance(value, Mapping):
                value = value.get("objective", value.get("name"))
            if isinstance(value, str):
                return value
        return "none"

    @property
    def seed(self) -> int | None:
        """The seed that training started from; where several keys are named seed, the outermost."""
        seeds = {key: value for key, value in flatten(self.config).items() if key.split(".")[-1] == "seed"}
        for key in ("seed", "train.seed", *sorted(seeds, key=lambda key: key.count("."))):
            if isinstance(seeds.get(key), int):
                return int(seeds[key])
        return None

    @cached_property
    def _telemetry(self) -> tuple[list[Record], int]:
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            return [], 0
        records, damaged = [], 0
        lines = file.read_bytes().split(b"\n")
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            record = _parse_object(line)
            if record is not None and _is_telemetry(record):
                records.append(record)
            elif number < len(lines) - 1:  # an unfinished last line is a run being written, not damage
                damaged += 1
        return _without_rewound(records), damaged

    @property
    def damaged_lines(self) -> int:
        """How many lines of telemetry could not be read, an unfinished last line apart."""
        return self._telemetry[1]

    def metrics(self, kind: str) -> list[Record]:
        """Return one kind of telemetry (train, validation, evaluation or samples) in order of steps."""
        return [record for record in self._telemetry[0] if record["kind"] == kind]

    @cached_property
    def evaluations(self) -> list[Record]:
        """Every evaluation that has metrics: those made while training, then the files of ``vrpo evaluate``.

        A file that says which step it scored, but not after how many images or seconds, takes them from the
        telemetry.
        """
        found = [dict(record) for record in self.metrics("evaluation")]
        for file in sorted((self.path / "evaluations").glob("*.json")):
            record = _load_object(file)
            if record is not None:
                found.append({**self._progress_at(record.get("step")), **record, "file": str(file)})
        return [record for record in found if isinstance(record.get("metrics"), Mapping)]

    def _progress_at(self, step: object) -> Record:
        for record in self._telemetry[0]:
            if step is not None and record.get("step") == step:
                return {key: record[key] for key in ("images", "seconds") if key in record}
        return {}

    @cached_property
    def sample_grids(self) -> list[SampleGrid]:
        """The sample grids whose files exist, oldest first."""
        return list(self._grids())

    def _grids(self) -> Iterator[SampleGrid]:
        for record in self.metrics("samples"):
            file = self.path / "samples" / Path(str(record.get("file", ""))).name
            labels = record.get("labels")
            if file.suffix == ".png" and _is_inside(file, self.path):
                yield SampleGrid(
                    file=file,
                    step=int(record["step"]),
                    images=int(record["images"]),
                    rows=_count(record.get("rows")),
                    columns=_count(record.get("columns")),
                    labels=labels if isinstance(labels, list) else [],
                )

    def checkpoints(self) -> list[Path]:
        """Return the folders of complete checkpoints, oldest first."""
        folders = (self.path / "checkpoints").glob("step-*")
        return sorted(folder for folder in folders if (folder / "state.json").is_file())

    def latest_checkpoint(self) -> Path:
        """Return the newest complete checkpoint by step; ``latest`` names it too, for other programs.

        Raises CheckpointError where there is none.
        """
        complete = self.checkpoints()
        if not complete:
            raise CheckpointError(f"no checkpoint in {self.path}: train it until the first one is written.")
        return complete[-1]


def _is_inside(file: Path, folder: Path) -> bool:
    """Whether a file lies in a folder, links followed: a report shows nothing from elsewhere."""
    return os.path.isfile(file) and file.resolve().is_relative_to(folder.resolve())


def open_checkpoint(path: Path) -> tuple[Run, Path]:
    """Return a run and its checkpoint's folder; ``path`` is a run, for its newest one, or a checkpoint itself.

    The file ``checkpoints/latest`` and the folder ``checkpoints`` stand for the newest one too.

    Raises:
        DataError: there is no run.
        CheckpointError: it has no checkpoint.
    """
    if (path / "state.json").is_file() and (path.parent.parent / "config.yaml").is_file():
        return Run(path.parent.parent), path
    folder = path.parent if path.name == "latest" else path
    run = Run(folder.parent if folder.name == "checkpoints" else path)
    return run, run.latest_checkpoint()


def number(value: object) -> float:
    """Return a measured number as a float, NaN for anything else: text, truth values, and what no run can measure."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST <= value <= _LARGEST:
        return math.nan
    return float(value)


def _count(value: object) -> int:
    return int(value) if number(value) >= 0 else 0  # type: ignore[call-overload]


def _is_telemetry(record: Record) -> bool:
    """Whether a record says what it is and how far the run was: all that readers take for granted."""
    return isinstance(record.get("kind"), str) and number(record.get("step")) >= 0 and number(record.get("images")) >= 0


def _has_shape_of_facts(facts: Record) -> bool:
    kinds = {"data": dict, "held_out": dict, "encoders": list}
    return all(isinstance(facts[key], kind) for key, kind in kinds.items() if key in facts)


def _parse_object(text: str | bytes) -> Record | None:
    try:
        value = parse_json(text)
        return unseal(value, required=False) if isinstance(value, dict) else None
    except ValueError:  # undecodable bytes, malformed JSON, or other content than was sealed
        return None


def _load_object(file: Path) -> Record | None:
    with file.open("rb") as stream:
        return _parse_object(stream.read(MAX_JSON_BYTES + 1))


def _without_rewound(records: list[Record]) -> list[Record]:
    """Drop what a resumed run wrote twice.

    A run that is killed and resumed repeats the steps since its last checkpoint, so a record whose step lies
    before an earlier one of its kind replaces everything of that kind from its step on.
    """
    kept: dict[str, list[Record]] = {}
    for record in records:
        same = kept.setdefault(record["kind"], [])
        step = record["step"]
        if same and step < same[-1]["step"]:
            same[:] = [earlier for earlier in same if earlier["step"] < step]
        identity = json.dumps(record.get("protocol"), sort_keys=True)
        if same and same[-1]["step"] == step:
            same[:] = [
                earlier
                for earlier in same
                if earlier["step"] != step or json.dumps(earlier.get("protocol"), sort_keys=True) != identity
            ]
        same.append(record)
    return [record for group in kept.values() for record in group]
