"""Checkpoints written beside training: of the state as it was, one at a time, and their failures are heard."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from vrpo.checkpoints import PARTS, find_checkpoints, load_checkpoint
from vrpo.errors import CheckpointError
from vrpo.processes import ALONE
from vrpo.training import checkpoint as checkpoint_module
from vrpo.training.trainer import Trainer
from vrpo.training.writer import CheckpointWriter


def state_of(step: int) -> dict[str, Any]:
    return {"step": step, "images": 8 * step}


def tensors_of(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {part: {"a": torch.full((3,), value), "b": torch.tensor(value)} for part in PARTS}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Holds every file back until it is set."""
    event, original = threading.Event(), checkpoint_module.save_tensors

    def save(path: Path, tensors: Any) -> None:
        assert event.wait(20)
        original(path, tensors)

    monkeypatch.setattr(checkpoint_module, "save_tensors", save)
    return event


def test_what_is_written_is_the_state_at_the_call(gate: threading.Event, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=2, keep_every=0, world=ALONE, sharded=False)
    tensors = tensors_of(1.0)
    writer.save(tensors, state_of(1))
    assert not find_checkpoints(tmp_path), "save came back before anything was written"
    for part in tensors.values():
        for value in part.values():
            value.fill_(2.0)
    gate.set()
    writer.save(tensors, state_of(2))
    writer.wait()
    second, first = map(load_checkpoint, find_checkpoints(tmp_path))
    for found, value in ((first, 1.0), (second, 2.0)):
        for part in PARTS:
            assert torch.equal(found.tensors[part]["a"], torch.full((3,), value))
            assert torch.equal(found.tensors[part]["b"], torch.tensor(value))


def test_a_second_checkpoint_waits_for_the_first(gate: threading.Event, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=2, keep_every=0, world=ALONE, sharded=False)
    writer.save(tensors_of(1.0), state_of(1))
    threading.Timer(0.2, gate.set).start()
    writer.save(tensors_of(2.0), state_of(2))
    assert [path.name for path in find_checkpoints(tmp_path)][-1:] == ["step-00000001"]
    writer.wait()


def test_a_failure_in_the_thread_is_raised_by_the_next_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, tensors: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "save_tensors", fail)
    writer = CheckpointWriter(tmp_path, keep=2, keep_every=0, world=ALONE, sharded=False)
    writer.save(tensors_of(1.0), state_of(1))
    with pytest.raises(CheckpointError, match="no space is left"):
        writer.wait()
    writer.check()
    assert not list((tmp_path / "checkpoints").iterdir())


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    leftover = tmp_path / "checkpoints" / ".step-00000007.tmp"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    writer = CheckpointWriter(tmp_path, keep=2, keep_every=0, world=ALONE, sharded=False)
    writer.save(tensors_of(1.0), state_of(9))
    writer.wait()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000009", "latest"}


def test_one_of_every_so_many_images_stays(make_config: Any, tmp_path: Path) -> None:
    config = make_config(train={"checkpoint_every": 8, "keep_checkpoints": 1, "keep_every": 40})
    Trainer(config, tmp_path / "run", say=lambda sentence: None).train()
    kept = [path.name for path in find_checkpoints(tmp_path / "run")]
    assert kept == ["step-00000012", "step-00000010", "step-00000005"]
