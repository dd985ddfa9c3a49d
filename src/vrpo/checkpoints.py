"""Checkpoints as they are read: which ones a run has, what they hold, and whether it is what was written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vrpo.errors import CheckpointError
from vrpo.files import load_tensors, sha256_file
from vrpo.untrusted import read_json, unseal

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("model", "ema", "objective", "optimizer")


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on: tensors by part, and counters."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def find_checkpoints(run: Path) -> list[Path]:
    """Return the run's finished checkpoints, newest first."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def step_of(path: Path) -> int:
    """Return the step in a checkpoint folder's name."""
    return int(path.name.rpartition("-")[2])


def read_state(path: Path, verify: bool = False) -> dict[str, Any]:
    """Read a checkpoint's counters, and with ``verify`` check every file against its hash.

    Raises:
        CheckpointError: a file is missing or does not match.
    """
    try:
        state = unseal(read_json(path / "state.json"))
        if not isinstance(state["sha256"], dict) or not isinstance(state["step"], int):
            raise ValueError("it holds no hashes")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path / 'state.json'} is missing or damaged: use another checkpoint.") from error
    for part in PARTS if verify else ():
        check_part(path / f"{part}.safetensors", state)
    return state


def check_part(file: Path, state: dict[str, Any]) -> None:
    """Compare one file of a checkpoint with its hash.

    Raises:
        CheckpointError: it is missing or does not match.
    """
    if not file.is_file() or sha256_file(file) != state["sha256"].get(file.name):
        raise CheckpointError(f"{file} is missing or does not match its hash: use another checkpoint.")


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint that was verified.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    state = read_state(path)
    return Checkpoint({part: load_tensors(path / f"{part}.safetensors") for part in PARTS}, state)
