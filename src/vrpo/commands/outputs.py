"""What commands leave behind: a place that cannot be written is refused before the work, and results are printed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from vrpo.errors import ConfigError
from vrpo.files import explain_os_error
from vrpo.untrusted import printable


def check_output(out: Path, *, folder: bool = False) -> None:
    """Make the folder that the file ``out`` goes into, or with ``folder`` the folder ``out`` itself.

    Raises:
        ConfigError: it cannot be made or written, with the part of the path that is in the way.
    """
    if folder and out.is_file():
        raise ConfigError(f"--out {out} is a file: give the name of a folder, or of a file of another kind.")
    if not folder and out.is_dir():
        raise ConfigError(f"--out {out} is a folder: give the name of a file in it.")
    blocker = next((part for part in out.parents if part.exists()), None)
    if blocker is not None and not blocker.is_dir():
        raise ConfigError(f"--out {out} lies inside {blocker}, which is a file: give another path.")
    target = out if folder else out.parent
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({explain_os_error(error)}): give another path.") from error
    if not os.access(target, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {out} cannot be written (permission denied): give another path.")


def check_result(out: Path, suffix: str, inputs: Iterable[Path]) -> None:
    """Refuse what `check_output` refuses, a name without ``suffix``, and one by which a file of ``inputs`` is replaced.

    Inside a folder of ``inputs`` a new file may be written, and anything in its folder ``evaluations``.

    Raises:
        ConfigError: as said.
    """
    place = out.resolve()
    for given in inputs:
        source = given.resolve()
        if place == source and not given.is_dir():
            raise ConfigError(f"--out {out} would replace {given}, which the command reads: give another path.")
        inside = place.is_relative_to(source) and not place.is_relative_to(source / "evaluations")
        if inside and out.is_file():
            raise ConfigError(f"--out {out} would replace a file of {given}, which the command reads: give a new name.")
    if out.suffix != suffix and not out.is_dir():
        raise ConfigError(f"--out {out} is no {suffix} file: give the name of one, such as {out.stem}{suffix}.")
    check_output(out)


def check_page(out: Path, option: str = "--out") -> None:
    """Refuse what `check_output` refuses, and a page of HTML under the name of another kind of file.

    Raises:
        ConfigError: as said.
    """
    if out.suffix.lower() not in (".html", ".htm") and not out.is_dir():
        raise ConfigError(f"{option} {out} is no name of an HTML file: write {out.stem}.html.")
    check_output(out)


def tell(text: str) -> None:
    """Print a result; control characters, which text from data may hold, are escaped."""
    print(printable(text))
