"""Checkpoints that are whole or absent: written beside, hashed, renamed; damaged ones are passed over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from vrpo.checkpoints import PARTS, Checkpoint, find_checkpoints, read_state
from vrpo.errors import CheckpointError
from vrpo.files import explain_os_error, is_unfinished, save_tensors, sha256_file, sync_folder, write_text
from vrpo.untrusted import seal


def save_checkpoint(
    run: Path,
    checkpoint: Checkpoint,
    keep: int | None,
    keep_every: int = 0,
    write: Callable[[Path, dict[str, Tensor]], None] | None = None,
) -> Path:
    """Write ``RUN/checkpoints/step-N`` and prune older ones beyond ``keep``, none where that is None.

    The folder gets its name only when every file in it is on disk; ``latest`` then points to it. Of every
    ``keep_every`` images one checkpoint is kept for good. ``write`` makes one part's safetensors file.

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    folder = run / "checkpoints"
    name = f"step-{checkpoint.state['step']:08d}"
    target = folder / name
    if target.is_dir():
        return target  # of the same step, hence of the same state
    temporary = folder / f".{name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        hashes = {}
        for part in PARTS:
            path = temporary / f"{part}.safetensors"
            (write or save_tensors)(path, checkpoint.tensors[part])
            hashes[path.name] = sha256_file(path)
        write_text(temporary / "state.json", json.dumps(seal({**checkpoint.state, "sha256": hashes}), indent=1))
        sync_folder(temporary)
        temporary.rename(target)
        sync_folder(folder)
        write_text(folder / "latest", name)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint at step {checkpoint.state['step']} could not be written to {folder} "
            f"({explain_os_error(error)}): earlier checkpoints are kept; make room and go on with --resume."
        ) from error
    if keep is not None:
        _prune(run, target, keep, keep_every)
    return target


def _prune(run: Path, newest: Path, keep: int, keep_every: int) -> None:
    """Remove checkpoints but the ``keep`` newest and the first beyond each multiple of ``keep_every`` images.

    What a killed process left unfinished goes, too.
    """
    lasting, passed = set(), 0
    for path in reversed(find_checkpoints(run)) if keep_every else ():
        try:
            images = int(read_state(path)["images"])
        except (CheckpointError, KeyError):
            continue
        if images // keep_every > passed:
            passed = images // keep_every
            lasting.add(path)
    others = [path for path in find_checkpoints(run) if path != newest]
    for old in others[keep - 1 :]:
        if old not in lasting:
            shutil.rmtree(old, ignore_errors=True)
    for leftover in filter(is_unfinished, newest.parent.iterdir()):
        shutil.rmtree(leftover, ignore_errors=True)


def find_newest(run: Path) -> tuple[Path, list[str]] | None:
    """Return the newest checkpoint that verifies, and why newer ones were passed over; None if there are none.

    Those are renamed to ``damaged-step-N``, so that they neither count as kept nor stand in the way of a new one, and
    ``latest`` names the one that is left.

    Raises:
        CheckpointError: there are checkpoints, but none verifies.
    """
    complaints: list[str] = []
    damaged: list[Path] = []
    for path in find_checkpoints(run):
        try:
            read_state(path, verify=True)
        except CheckpointError as error:
            complaints.append(without_advice(error))
            damaged.append(path)
            continue
        for folder in damaged:
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        _point_to(path)
        told = zip(complaints, damaged, strict=True)
        return path, [f"{complaint}; it was set aside as damaged-{folder.name}." for complaint, folder in told]
    if complaints:
        raise CheckpointError(
            f"no checkpoint of {run} can be used (the newest: {complaints[0]}): put back a copy of one, or start again "
            "in another --out."
        )
    return None


def without_advice(error: CheckpointError) -> str:
    """Return what is wrong with a checkpoint, without the advice to use another one, where that is done."""
    return str(error).removesuffix(": use another checkpoint.")


def _point_to(newest: Path) -> None:
    """Let ``latest`` name a checkpoint, where it names one that was set aside."""
    latest = newest.with_name("latest")
    if not latest.is_file() or latest.read_bytes() != newest.name.encode():
        write_text(latest, newest.name)
