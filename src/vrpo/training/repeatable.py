"""Training that repeats to the bit on a GPU too, where the fastest kernels add up in another order each time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vrpo.errors import ConfigError

# cuBLAS repeats itself only with work space of a fixed size, and reads this when it is first used.
WORKSPACE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


@contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """Let torch use deterministic algorithms alone in the block, if ``wanted``.

    Raises:
        ConfigError: something has none.
    """
    if not wanted or torch.are_deterministic_algorithms_enabled():
        yield
        return
    for name, value in WORKSPACE.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        operation = str(error).split(maxsplit=1)[0]
        raise ConfigError(
            f"train.deterministic: {operation} has no deterministic form on this device: leave the option out."
        ) from error
    finally:
        torch.use_deterministic_algorithms(False)
