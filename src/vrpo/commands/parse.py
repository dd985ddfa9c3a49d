"""Reading a command's words into its options."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from typing import TypeVar

import tyro

from vrpo.errors import ConfigError, nearest

T = TypeVar("T")


def parse(command: type[T], words: Sequence[str], name: str, *, rest: bool = False) -> tuple[T, list[str]]:
    """Read ``words`` into a command's options; with ``rest``, also return the words it does not know.

    Raises:
        ConfigError: words that do not fit.
    """
    prog = f"vrpo {name}"
    if not rest and ("--help" in words or "-h" in words):
        tyro.cli(command, prog=prog, args=["--help"])
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            options, unknown = tyro.cli(command, prog=prog, args=list(words), return_unknown_args=True)
    except SystemExit as stop:
        lines = [line.strip("╭╮╰╯│─ ") for line in output.getvalue().splitlines()[1:]]
        said = " ".join(line for line in lines if line and not line.startswith("For full")).rstrip(".")
        said = said.partition(" Argument helptext:")[0]
        raise ConfigError(f"{prog}: {said}: see `{prog} --help`.") from stop
    if unknown and not rest:
        choices = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(command)]  # type: ignore[arg-type]
        raise ConfigError(f"{prog} has no option '{unknown[0]}': {nearest(unknown[0], choices)}")
    return options, list(unknown)
