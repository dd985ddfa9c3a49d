"""The processes of one command: who they are, what they tell each other, and one sentence where one of them refuses.

A launcher such as `torchrun` starts the processes and says in the environment who is who (RANK, WORLD_SIZE and so on).
What the hosts tell each other (errors, requests to stop, file names) goes through a gloo group of its own, so it needs
no GPU and never meets the gradients.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vrpo.errors import ConfigError, VrpoError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# How long the gradients of a step may take to meet.
STEP_TIMEOUT = timedelta(minutes=10)
# How long processes may wait for the first one, which alone scores samples and fills token caches.
HOST_TIMEOUT = timedelta(hours=6)
# Where the launcher's store says that a process has failed.
_FAILED = "vrpo/failed"


class ProcessError(VrpoError):
    """Another process of the run failed in a way that is not a user's error."""


class _OtherFailed(Exception):
    """Another process has failed, whose error all are about to raise."""


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them; the default is a run of one process.

    ``group`` is the hosts' group and ``store`` the launcher's store, None where there is no launcher. Under a launcher
    there are both even for one process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    group: Any = None
    store: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def connected(self) -> bool:
        """Whether a launcher started this process."""
        return self.group is not None

    def divided(self, count: int) -> list[int]:
        """Return this process's share of ``count`` batches; all get equally many, the last again where they lack one.

        So sharded networks, in whose calls all processes take part, are called equally often.
        """
        return [min(index, count - 1) for index in range(self.rank, -(-count // self.size) * self.size, self.size)]

    def gather(self, value: T) -> list[T]:
        """Return every process's ``value``, by rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def ask_first(self, work: Callable[[], T]) -> T:
        """Let the first process do ``work``, and return its result, or raise its error, in all of them."""
        if self.size == 1:
            return work()
        import torch.distributed as dist

        found: list[Any] = [None]
        with self.agreed():
            if self.first:
                found = [work()]
        dist.broadcast_object_list(found, src=0, group=self.group)
        return found[0]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Raise at the end of the block in all processes if one of them failed in it.

        The block must not talk to other processes. The error is marked ``shared``, and ``silent`` in all processes
        but the first of those that failed, which tells it.
        """
        if self.size == 1:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except _OtherFailed:
            pass
        except Exception as error:
            own = error
            self.store.set(_FAILED, "")
        self._settle(own)

    def stop_if_failed(self) -> None:
        """End a long block of ``agreed`` at once where another process has failed in its own."""
        if self.size > 1 and self.store.check([_FAILED]):
            raise _OtherFailed

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Do the block in the first process, then in the others, which find on disk what the first one made."""
        if self.size == 1:
            yield
            return
        if not self.first:
            self._settle(None)
        with self.agreed():
            yield
        if self.first:
            self._settle(None)

    def _settle(self, own: Exception | None) -> None:
        if self.size == 1:
            return
        told = own
        if own is not None and not isinstance(own, (VrpoError, OSError)):
            told = ProcessError(f"process {self.rank} of {self.size} failed with {type(own).__name__}: see its output.")
        errors = self.gather(told)
        failed = [rank for rank, error in enumerate(errors) if error is not None]
        if not failed:
            return
        error: Any = own if own is not None else errors[failed[0]]
        error.shared, error.silent = True, self.rank != failed[0]
        raise error

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the means over processes of float tensors that all of them hold under the same names."""
        if self.size == 1 or not values:
            return dict(values)
        import torch
        import torch.distributed as dist

        flat = torch.cat([value.float().flatten() for value in values.values()])
        dist.all_reduce(flat)
        flat /= self.size
        parts = flat.split([value.numel() for value in values.values()])
        return {name: part.view(value.shape) for (name, value), part in zip(values.items(), parts, strict=True)}

    def add_up(self, value: Tensor) -> None:
        """Replace ``value`` by its sum over processes."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(value)


ALONE = World()


@contextmanager
def connect(patience: timedelta = HOST_TIMEOUT, go_on: str = "go on with --resume") -> Iterator[World]:
    """Join the processes that a launcher started, for the time of the block.

    ``patience`` is how long one may wait for the others, ``go_on`` what to do where one of them is lost.

    Raises:
        ConfigError: the launcher's environment is incomplete, or the others do not come.
        ProcessError: one of them is lost, or hangs.
    """
    world = _from_environment(os.environ)
    if world is None:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=STEP_TIMEOUT))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.PrefixStore(_name_of_start(store, world), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=STEP_TIMEOUT)
        group = dist.new_group(backend="gloo", timeout=patience)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"process {world.rank} could not join the other {world.size - 1} ({reason}): start all of them with one "
            "torchrun command, the same rendezvous on every node."
        ) from error
    together = True
    try:
        yield replace(world, group=group, store=store)
    except RuntimeError as error:
        together = False
        if not _is_of_connection(error):
            raise
        reason = " ".join(str(error).split())[:200]
        found = f"lost another one ({reason}): see why that one ended"
        if "Timed out" in reason:
            found = f"has waited in vain for another one, which hangs ({reason}): see what that one does, end it"
        raise ProcessError(
            f"process {world.rank} of {world.size} {found}, then {go_on}; torchrun --max-restarts N does so by itself."
        ) from error
    except BaseException as error:
        together = getattr(error, "shared", False)
        raise
    finally:
        # NCCL would wait for processes that do not know of an error; gloo closes its connections, which they notice.
        if together or backend == "gloo":
            dist.destroy_process_group()


def leave_reason(sentence: str) -> None:
    """Leave why this process fails to torchrun, if that started it: its summary then ends with the sentence.

    The format is that of `torch.distributed.elastic.multiprocessing.errors.record`, without a traceback.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    reason = {"message": {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}}
    try:
        Path(file).write_text(json.dumps(reason), encoding="utf-8")
    except OSError:
        return  # it is printed all the same


def _name_of_start(store: Any, world: World) -> str:
    """Return a name for this start of the processes, the same in all of them and unlike that of any other start.

    torchrun's own store outlives the processes that it starts again, which would take addresses of lost ones for those
    of the living (pytorch/pytorch#135712). Its count of restarts differs between nodes. So each process leaves a word
    of its own; the first one answers every word with the name until the newest word of each has been acknowledged,
    which those of lost processes never are.
    """
    word, folder = uuid.uuid4().hex, "vrpo"
    if not world.first:
        store.set(f"{folder}/word/{world.rank}", word)
        name = store.get(f"{folder}/name/{word}").decode()
        store.set(f"{folder}/heard/{word}/{name}", "")
        return str(name)
    deadline = time.monotonic() + STEP_TIMEOUT.total_seconds()
    waiting = set(range(1, world.size))
    while waiting:
        for rank in sorted(waiting):
            if not store.check([f"{folder}/word/{rank}"]):
                continue
            theirs = store.get(f"{folder}/word/{rank}").decode()
            store.set(f"{folder}/name/{theirs}", word)
            if store.check([f"{folder}/heard/{theirs}/{word}"]):
                waiting.discard(rank)
        if time.monotonic() > deadline:
            raise RuntimeError(f"process {min(waiting)} did not come within {STEP_TIMEOUT.total_seconds():.0f} s")
        time.sleep(0.02)
    return word


def _is_of_connection(error: RuntimeError) -> bool:
    """Return whether an error says that another process is gone or silent; gloo's have no type of their own."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _from_environment(environment: Mapping[str, str]) -> World | None:
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not {"RANK", "WORLD_SIZE"} <= environment.keys():
        return None
    missing = [name for name in needed if name not in environment]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is set but {missing[0]} is not: start the processes with torchrun, or unset WORLD_SIZE."
        )
    try:
        numbers = [int(environment.get(name, default)) for name, default in _NUMBERS]
    except ValueError as error:
        raise ConfigError(
            "RANK, WORLD_SIZE or LOCAL_RANK is not a number: start the processes with torchrun."
        ) from error
    world = World(*numbers)
    if min(world.size, world.local_size) < 1:
        raise ConfigError("WORLD_SIZE or LOCAL_WORLD_SIZE is below 1: start the processes with torchrun.")
    return world


_NUMBERS = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))


def local_device(name: str, world: World) -> str:
    """Return the device of this process: for "auto" under a launcher, the GPU of its local rank.

    Raises:
        ConfigError: there are fewer GPUs than processes, or one GPU is named for all of them.
    """
    import torch

    if world.local_size > 1 and name.startswith("cuda:"):
        raise ConfigError(f"train.device '{name}' would put all processes on one GPU: use auto.")
    if not world.connected or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    if world.local_size > torch.cuda.device_count():
        raise ConfigError(
            f"{world.local_size} processes were started on a machine with {torch.cuda.device_count()} GPUs: give "
            f"torchrun --nproc-per-node {torch.cuda.device_count()}."
        )
    return f"cuda:{world.local_rank}"
