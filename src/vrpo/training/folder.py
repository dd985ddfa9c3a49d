"""A run's folder: whether a run may begin or go on in it, what a resumed run may change, and the records kept there."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import vrpo
from vrpo.checkpoints import read_state
from vrpo.config import RunConfig
from vrpo.config_load import load_file, to_yaml, validate
from vrpo.errors import CheckpointError, ConfigError
from vrpo.files import is_unfinished, write_text
from vrpo.free_keys import is_free
from vrpo.models.transformer import parameter_count
from vrpo.processes import World
from vrpo.runs import flatten
from vrpo.training.lock import FILE as LOCK
from vrpo.training.setup import Parts
from vrpo.training.telemetry import Journal
from vrpo.untrusted import seal, seal_text

# Objectives in which nothing depends on how long the run will be.
TIMELESS = ("none", "repa", "irepa", "contrastive")
# Objectives that compare images of one forward pass with each other; for the others its size is a matter of memory.
COMPARING = ("contrastive",)


def claim_folder(run: Path, config: RunConfig, resume: bool) -> None:
    """Refuse to write over another run, or to go on with one under a configuration that would change it.

    Raises:
        ConfigError: the folder holds something else, or the first key that differs.
    """
    file = run / "config.yaml"
    if not file.is_file():
        # A process that was killed in its first moment leaves hidden files.
        if run.is_dir() and any(not is_unfinished(child) and child.name != LOCK for child in run.iterdir()):
            raise ConfigError(f"{run} is not empty and holds no run: choose another --out.")
        return
    if not resume:
        if not (run / "checkpoints").is_dir() and not (run / "metrics.jsonl").is_file():
            return  # it failed before its first step: nothing is lost by beginning again
        raise ConfigError(f"{run} holds a run already: go on with --resume, or choose another --out.")
    if _is_imported(run):
        raise ConfigError(
            f"{run} was imported, and weights alone hold no optimiser and no place in the data to go on from: sample "
            "and evaluate it, or train a run from the beginning in another --out."
        )
    old = flatten(validate(load_file(file, sealed=True), str(file)).model_dump(mode="json"))
    new = flatten(config.model_dump(mode="json"))
    for key in sorted(set(old) | set(new)):
        if old.get(key) != new.get(key) and not _may_change(key, config):
            raise ConfigError(
                f"resuming {run} would change {key} from {old.get(key)} to {new.get(key)}: start a new run with "
                "another --out, or leave it as it was."
            )


def _is_imported(run: Path) -> bool:
    """Whether `vrpo import` made the run, of which there is one checkpoint, without an optimiser's state."""
    try:
        return "imported" in read_state(run / "checkpoints" / "step-00000000")
    except CheckpointError:
        return False


def _may_change(key: str, config: RunConfig) -> bool:
    align = config.align
    if key == "train.images":
        counted = align.supply == "none" or (align.supply == "clock" and align.scaffold.steps > 0)
        return align.side in TIMELESS and counted and align.perceptual_image.kind == "none"
    if key == "train.micro_batch":
        return align.side not in COMPARING
    return is_free(key)


def begin_folder(run: Path, parts: Parts, world: World) -> None:
    """Make the folder with its configuration and facts, and remove what a killed process left unfinished."""
    run.mkdir(parents=True, exist_ok=True)
    for leftover in filter(is_unfinished, run.iterdir()):
        leftover.unlink(missing_ok=True)
    write_text(run / "config.yaml", seal_text(to_yaml(parts.config)))
    write_facts(run, parts, "running", world)


def write_facts(run: Path, parts: Parts, status: str, world: World) -> None:
    """Write ``run.json``."""
    write_text(run / "run.json", json.dumps(seal(_facts(parts, status, world)), indent=1))


def _facts(parts: Parts, status: str, world: World) -> dict[str, Any]:
    """Return what ``run.json`` records about a run."""
    data, held_out = parts.dataset, parts.held_out
    device = parts.device
    facts = {
        "name": parts.config.name,
        "objective": parts.config.align.objective,
        "status": status,
        "vrpo": vrpo.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {sys.platform}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": world.size,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "parameters": {"trunk": parameter_count(parts.trunk), "objective": parameter_count(parts.objective)},
        "encoders": parts.targets.fingerprints,
        "data": {
            "path": str(data.path),
            "fingerprint": data.fingerprint,
            "images": len(data),
            "classes": data.num_classes,
            "class_names": list(data.class_names),
        },
    }
    if held_out is not None:
        facts["held_out"] = {
            "path": str(held_out.path),
            "fingerprint": held_out.fingerprint,
            "images": len(held_out),
        }
    if parts.image_distance is not None:
        facts["image_distance"] = parts.image_distance.fingerprint
    return facts


def open_journal(run: Path, images: int, world: World, say: Callable[[str], None]) -> Journal:
    """Open the telemetry of a run that is at ``images`` images.

    Processes other than the first keep none, but know what is in it.
    """
    file = run / "metrics.jsonl"
    opened: list[Journal] = []

    def last() -> dict[str, int]:
        opened.append(Journal(file, images))
        return opened[0].last

    known = world.ask_first(last)
    if not opened:
        return Journal(None, images, known)
    if opened[0].damaged:
        say(f"Left out {opened[0].damaged} damaged lines of {file}.")
    return opened[0]
