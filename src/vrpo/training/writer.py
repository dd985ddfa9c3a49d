"""Checkpoints beside training: a copy of the state is taken, and a thread writes it while training goes on.

A whole tensor is written by the first process. Shards are written by all of them with `torch.distributed.checkpoint`,
in its safetensors layout: its own layout keeps its index as a pickle, which reading a checkpoint must never need. The
shards of each part are then joined to one file, so that a checkpoint looks the same whatever wrote it, any number of
processes can read it, and so can anything that reads safetensors.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vrpo.checkpoints import PARTS, Checkpoint
from vrpo.errors import CheckpointError, VrpoError
from vrpo.files import save_tensors
from vrpo.processes import HOST_TIMEOUT, World
from vrpo.training.checkpoint import save_checkpoint
from vrpo.training.optim import is_sharded

Parts = dict[str, dict[str, Tensor]]
Write = Callable[[Path, dict[str, Tensor]], None]

# Seconds that a checkpoint under way is given where this process fails on its own.
PATIENCE = 10.0


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time."""

    def __init__(self, run: Path, keep: int, keep_every: int, world: World, sharded: bool) -> None:
        """Set up for a run whose state is ``sharded`` over the processes, or whole in each."""
        self.run, self.keep, self.keep_every, self.world = run, keep, keep_every, world
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: VrpoError | None = None
        self._saved: int | None = None
        self._group: Any = None
        if sharded:
            import torch.distributed as dist

            # The thread's messages must not meet those of training.
            self._group = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)

    def save(self, tensors: Parts, state: dict[str, Any], prune: bool = True) -> None:
        """Copy ``tensors`` and begin to write them, after waiting for the checkpoint before.

        Without ``prune`` every older checkpoint stays.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.wait()
        if self._saved == state["step"]:
            return
        self._saved = state["step"]
        copies = self._copy(tensors)
        if not self.world.first and self._group is None:
            return
        # A state that is whole needs no other process, so the interpreter may wait for the end of its writing.
        self._thread = threading.Thread(
            target=self._write, args=(copies, state, prune), name="vrpo-checkpoint", daemon=self._group is not None
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait for the checkpoint under way.

        Raises:
            CheckpointError: it could not be written, in any process.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    def leave(self, together: bool) -> None:
        """Let the checkpoint under way end, where the run has ended by an error; its own is not told beside that.

        Where the processes did not fail ``together``, another one may be lost or silent: it is given little time.
        """
        if self._thread is not None:
            self._thread.join(None if together else PATIENCE)

    def check(self) -> None:
        """Raise what ``wait`` would if the checkpoint under way has failed already."""
        self._raise()

    def _raise(self) -> None:
        with self.world.agreed():
            error, self._error = self._error, None
            if error is not None:
                raise error

    def _copy(self, tensors: Parts) -> Parts:
        """Copy this process's part of the state to main memory, into the same buffers every time."""
        copies: Parts = {}
        for part in PARTS:
            copies[part] = {}
            for name, value in tensors[part].items():
                value = value.detach()
                if is_sharded(value):
                    copies[part][name] = _as_shard(self._buffer((part, name), value.to_local()), value)  # type: ignore[attr-defined]
                elif self.world.first:
                    copies[part][name] = self._buffer((part, name), value)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies to pinned memory run behind the host
        return copies

    def _buffer(self, key: tuple[str, str], value: Tensor) -> Tensor:
        buffer = self._copies.get(key)
        if buffer is None or buffer.shape != value.shape:
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.device.type == "cuda")
            self._copies[key] = buffer
        return buffer.copy_(value, non_blocking=True)

    def _write(self, copies: Parts, state: dict[str, Any], prune: bool) -> None:
        """Write a checkpoint; this runs in the thread."""
        try:
            if self._group is None:
                self._save(copies, state, prune)
            else:
                self._write_together(copies, state, prune)
        except VrpoError as error:
            self._error = error
        except BaseException as error:  # nobody would hear of it in a thread
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._error = CheckpointError(
                f"the checkpoint at step {state['step']} could not be written ({reason}): earlier checkpoints are "
                "kept; go on with --resume."
            )

    def _save(self, copies: Parts, state: dict[str, Any], prune: bool, write: Write | None = None) -> None:
        keep = self.keep if prune else None
        save_checkpoint(self.run, Checkpoint(copies, state), keep, self.keep_every, write)

    def _write_together(self, copies: Parts, state: dict[str, Any], prune: bool) -> None:
        """Write shards from all processes; the first one leads, and the others wait to hear that a folder is there."""
        if not self.world.first:
            failure: Exception | None = None
            for part in PARTS:
                folder = self._announce(None)
                if folder is None:
                    break
                try:
                    if folder:
                        write_shards(Path(folder), copies[part], self._group)
                except (OSError, CheckpointError) as error:
                    failure = error  # the first process failed, too, and ends the writing
            if failure is not None:
                raise failure
            return
        parts = len(PARTS)

        def write(path: Path, tensors: dict[str, Tensor]) -> None:
            nonlocal parts
            parts -= 1
            if not any(is_sharded(value) for value in tensors.values()):
                self._announce("")
                save_tensors(path, tensors)
                return
            folder = path.with_suffix("")
            self._announce(str(folder))
            write_shards(folder, tensors, self._group)
            (joined,) = folder.glob("*.safetensors")
            with joined.open("rb+") as file:
                os.fsync(file.fileno())  # joining leaves it to the system when it is on disk
            joined.rename(path)
            shutil.rmtree(folder)

        try:
            self._save(copies, state, prune, write)
        finally:
            if parts:
                self._announce(None)

    def _announce(self, folder: str | None) -> str | None:
        """Tell the other processes where the next part's shards go, or hear of it; None ends the writing."""
        import torch.distributed as dist

        told = [folder]
        dist.broadcast_object_list(told, src=0, group=self._group)
        return told[0]


def write_shards(folder: Path, tensors: dict[str, Tensor], group: Any) -> None:
    """Write shards of all processes of ``group`` to ``folder`` and join them there to one safetensors file.

    Raises:
        OSError: the disk is full or not writable, in any process.
        CheckpointError: any other failure.
    """
    import torch.distributed.checkpoint as dcp

    # Joining loses the value of a tensor without dimensions.
    tensors = {name: value if value.ndim else value.reshape(1) for name, value in tensors.items()}
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True, enable_consolidation=True)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group)
    except dcp.CheckpointException as error:
        failures = [failure for failure, _ in error.failures.values()]
        known = next((failure for failure in failures if isinstance(failure, OSError)), None)
        raise known or CheckpointError(f"shards could not be written to {folder} ({failures[0]!r}).") from error


def _as_shard(copy: Tensor, value: Any) -> Tensor:
    """Return a copy of ``value``'s local part as the same part of a tensor in main memory."""
    from torch.distributed.tensor import DTensor

    mesh = _host_mesh(value.device_mesh)
    return DTensor.from_local(copy, mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride())


_MESHES: dict[Any, Any] = {}


def _host_mesh(mesh: Any) -> Any:
    """Return the mesh of the same processes for tensors in main memory."""
    if mesh.device_type == "cpu":
        return mesh
    if mesh not in _MESHES:
        from torch.distributed.device_mesh import DeviceMesh

        _MESHES[mesh] = DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)
    return _MESHES[mesh]
