"""Commands that one process runs: under a launcher of several, each would do all the work and write the same file."""

from __future__ import annotations

import os

from vrpo.errors import ConfigError

_DRAWING = "draw with `torchrun ... -m vrpo sample RUN --out samples.npz`, then score with `vrpo evaluate samples.npz`"


def refuse_processes(name: str) -> None:
    """Refuse to run the command ``name`` as one of several processes; the first of them says so.

    Raises:
        ConfigError: a launcher has started several.
    """
    started = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"
    if started == "1":
        return
    remedy = f"{_DRAWING} without torchrun" if name == "evaluate" else "run it without torchrun"
    error = ConfigError(f"vrpo {name} is the work of one process, and {started} were started: {remedy}.")
    error.silent = os.environ["RANK"] != "0"
    raise error
