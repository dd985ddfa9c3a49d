"""Going back before trouble: an earlier checkpoint, and the data that led into the trouble passed over.

Data and noise of step s are those of position s + P, where P is the number of steps passed over so far. A rewind at
step r to the checkpoint of step c sets P so that position r follows, which no step has seen. ``rewinds.json`` records
every rewind, each checkpoint the P that it was trained under, so that resuming is as deterministic as without. Passing
over the batches before a spike of the loss is what PaLM did (Chowdhery et al. 2022, section 5.1).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vrpo.checkpoints import find_checkpoints, read_state, step_of
from vrpo.errors import CheckpointError
from vrpo.files import write_text
from vrpo.runs import Run
from vrpo.training.checkpoint import without_advice
from vrpo.untrusted import read_json, seal, unseal

FILE = "rewinds.json"


@dataclass(frozen=True)
class Rewind:
    """One rewind: the images asked for, the checkpoint's step, and the steps passed over in all from there on."""

    images: int
    step: int
    passed: int


def read_rewinds(run: Path) -> list[Rewind]:
    """Return a run's rewinds, by step.

    Raises:
        CheckpointError: their file is damaged.
    """
    file = run / FILE
    if not file.is_file():
        return []
    try:
        return [Rewind(**entry) for entry in unseal(read_json(file))["rewinds"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} is damaged ({error}): which data were passed over is lost with it, so put it back or start anew."
        ) from error


def passed_at(rewinds: list[Rewind], step: int) -> int:
    """Return how many steps' data were passed over in all before the step that follows ``step`` steps."""
    return next((rewind.passed for rewind in reversed(rewinds) if rewind.step <= step), 0)


def rewind_run(run: Path, images: int, batch_size: int) -> str:
    """Record a rewind to the newest checkpoint of at most ``images`` images that verifies, and say what it does.

    The same request again, as a launcher that restarts the command makes, does nothing.

    Raises:
        CheckpointError: there is no such checkpoint, none verifies, or nothing was trained since.
    """
    rewinds = read_rewinds(run)
    if rewinds and rewinds[-1].images == images:
        return f"{run} was rewound to {images:,} images already: going on from there; another number goes back again."
    saved = find_checkpoints(run)
    known = [path for path in saved if step_of(path) * batch_size <= images]
    if not known:
        oldest = f"the oldest is of {step_of(saved[-1]) * batch_size:,}" if saved else "there is none"
        raise CheckpointError(
            f"{run} has no checkpoint of at most {images:,} images ({oldest}): give a larger --rewind."
        )
    target, complaints = _newest_whole(known)
    records = Run(run).metrics("train")
    reached = max(step_of(saved[0]), int(records[-1]["step"]) if records else 0)
    if reached <= target:
        raise CheckpointError(
            f"{run} has trained no further than its checkpoint of {target * batch_size:,} images: there is nothing to "
            "rewind; give a smaller --rewind, or leave it out."
        )
    passed = passed_at(rewinds, reached) + reached - target
    kept = [rewind for rewind in rewinds if rewind.step < target]
    entries = [asdict(rewind) for rewind in (*kept, Rewind(images, target, passed))]
    write_text(run / FILE, json.dumps(seal({"rewinds": entries}), indent=1))
    return "".join(f"Passed over a checkpoint: {complaint}. " for complaint in complaints) + (
        f"Rewound {run} from step {reached} to its checkpoint at step {target}: the data of the {reached - target} "
        "steps between are passed over, and the noise is drawn anew."
    )


def _newest_whole(known: Sequence[Path]) -> tuple[int, list[str]]:
    """Return the step of the first of these checkpoints that verifies, and what is wrong with those before it."""
    complaints: list[str] = []
    for path in known:
        try:
            read_state(path, verify=True)
        except CheckpointError as error:
            complaints.append(without_advice(error))
        else:
            return step_of(path), complaints
    raise CheckpointError(
        f"no checkpoint to rewind to can be used; the newest: {complaints[0]}: give a larger --rewind, or put "
        "back a copy of one."
    )


def set_aside_rewound(run: Path) -> None:
    """Rename checkpoints that a rewind left behind, so that nothing goes on from them."""
    rewinds = read_rewinds(run)
    for path in find_checkpoints(run) if rewinds else ():
        try:
            state = read_state(path)
        except CheckpointError:
            continue  # told when it is its turn to be read
        if state.get("passed", 0) != passed_at(rewinds, state["step"] - 1):
            aside = path.with_name(f"rewound-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
