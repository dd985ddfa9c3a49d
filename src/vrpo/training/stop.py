"""A request to stop, by Ctrl-C or SIGTERM, that the processes of a run honour together at the end of a step."""

from __future__ import annotations

import signal
import threading
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vrpo.processes import World

# How long a step's request to stop may take: less than its gradients, for NCCL ends a process that waits too long for
# those without a word of ours.
SIGNAL_TIMEOUT = timedelta(minutes=9)


class StopRequest:
    """Context in which SIGINT and SIGTERM set ``signal`` to their number; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python takes signals in the main thread only; elsewhere the caller's own handlers stay.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


class SharedSignal:
    """The largest of the processes' signal numbers, agreed on without waiting for it.

    Each step's question is answered at the next one, so that no step waits for the network, and all processes
    learn the answer at the same step.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: tuple[Any, Tensor] | None = None

    def agree(self, number: int | None) -> int | None:
        """Tell this process's signal and return the one that all know of, or None.

        Raises:
            RuntimeError: another process is gone, or does not answer, which `vrpo.processes.connect` tells.
        """
        if self._world.size == 1:
            return number
        answer = None
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            answer = int(flag.item()) or None
        flag = torch.tensor([number or 0], dtype=torch.int64)
        # A time limit of the question's own: gloo waits for a pending one at exit, which would take the group's hours.
        options = dist.AllreduceOptions()
        options.reduceOp, options.timeout = dist.ReduceOp(dist.ReduceOp.MAX), SIGNAL_TIMEOUT
        self._pending = (self._world.group.allreduce([flag], options), flag)
        return answer
