"""The processes that prepare one data set together, as ``torchrun`` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """This process's number among ``size``."""

    rank: int
    size: int

    def barrier(self) -> None:
        """Wait until every process has come here."""
        if self.size > 1:
            import torch.distributed

            torch.distributed.barrier()


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Meet the other processes that ``torchrun`` started, if any."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(0, 1)
        return
    from datetime import timedelta

    import torch.distributed

    # Ranks finish far apart where some have no shard left; torchrun ends them all if one fails.
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield Ranks(torch.distributed.get_rank(), size)
    finally:
        torch.distributed.destroy_process_group()
