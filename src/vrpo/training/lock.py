"""One process trains in a folder at a time: it holds a lock there, which the system drops when it ends, however."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TextIO

from vrpo.errors import ConfigError

FILE = ".lock"


class FolderLock:
    """The lock on a run's folder, of a process as a whole: taking it again within one process is no conflict.

    Where the folder or the system holds no locks (Windows, some network file systems), nothing is locked.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._file: TextIO | None = None

    def take(self) -> None:
        """Take the lock, if the folder is there and this object does not hold it.

        Raises:
            ConfigError: another process holds it.
        """
        if self._file is not None or not self.run.is_dir():
            return
        try:
            import fcntl

            file = (self.run / FILE).open("a", encoding="utf-8")
        except (ImportError, OSError):
            return  # what cannot be written there is told when it matters
        try:
            # Not flock: a child of a killed process would hold it on, and few network file systems know it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ConfigError(
                    f"another process is training in {self.run}: wait until it ends, or choose another --out."
                ) from error
        else:
            self._file = file

    def close(self) -> None:
        """Let others train in the folder."""
        if self._file is not None:
            self._file.close()
            self._file = None
