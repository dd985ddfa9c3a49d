"""Files read by memory map, where a file that is cut meanwhile is a sentence and not the end of the process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from vrpo.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class MappedFile:
    """A file of ``size`` bytes as the array ``bytes``, uint8 (size,), of which memory holds what was touched.

    Unlike numpy's and Python's own maps it holds no file descriptor: ImageNet at 256 px is a thousand shards, and a
    process may have as many descriptors by default. Raises OSError where the file cannot be opened.
    """

    def __init__(self, file: Path, size: int) -> None:
        import torch

        self._name = str(file)
        try:
            self.bytes: NDArray[np.uint8] = torch.from_file(
                self._name, shared=False, size=size, dtype=torch.uint8
            ).numpy()
        except RuntimeError as error:
            raise OSError(" ".join(str(error).split())) from error

    def check(self) -> None:
        """Raise DataError if the file was cut since it was mapped.

        A touch of what is no longer there is a bus error, which ends the process without a word; so readers ask before
        every batch. A file that was moved, deleted or replaced stays mapped as it was.
        """
        size = len(self.bytes)
        try:
            found = os.stat(self._name).st_size
        except OSError:
            return
        if found < size:
            raise DataError(
                f"'{self._name}' was cut to {found:,} of {size:,} bytes while it was read: restore it, or delete its "
                "folder and make it again."
            )
