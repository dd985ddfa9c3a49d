"""Arrays of an ``.npz`` of unknown origin: sizes are checked before memory is taken, and nothing is unpickled."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from vrpo.errors import EvaluationError

Limit = tuple[int, ...]

# Numbers of at most eight bytes. Objects would be pickles.
_KINDS = "biuf"
_MAX_NUMBER = 8
# Text of a single item, such as a record of how images were drawn, at four bytes a character.
_MAX_TEXT = 4 << 20


def npz_members(path: Path) -> dict[str, int]:
    """Return the names of the arrays in an ``.npz``, each with the CRC-32 of its content.

    Raises EvaluationError where it is none.
    """
    with _reading(path), zipfile.ZipFile(path) as archive:
        return {member.filename.removesuffix(".npy"): member.CRC for member in archive.infolist()}


def read_arrays(path: Path, limits: Mapping[str, Limit]) -> dict[str, NDArray[Any]]:
    """Return the arrays named in ``limits`` that are there, each of as many axes as its limit and none longer.

    An array is of numbers, or of no axes and text. Raises EvaluationError where the file or one of these arrays is
    damaged, of another type, or too large.
    """
    arrays = {}
    with _reading(path), zipfile.ZipFile(path) as archive:
        present = set(archive.namelist())
        for name, limit in limits.items():
            if f"{name}.npy" not in present:
                continue
            with open_array(archive, name, path) as (stream, shape, fortran_order, dtype):
                if len(shape) != len(limit) or any(a > b for a, b in zip(shape, limit, strict=True)):
                    raise EvaluationError(
                        f"'{name}' of {path} is {dtype} of shape {shape}, and at most {limit} is read; "
                        "give an .npz of feature statistics."
                    )
                content = stream.read(math.prod(shape) * dtype.itemsize)
                stream.read(1)  # at the end the checksum is compared
                arrays[name] = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran_order else "C").copy()
    return arrays


@contextmanager
def open_array(
    archive: zipfile.ZipFile, name: str, path: Path
) -> Iterator[tuple[IO[bytes], tuple[int, ...], bool, np.dtype[Any]]]:
    """Open array ``name`` of an archive at its first element, with shape, whether in Fortran order, and type.

    Raises EvaluationError where it is no array of numbers or text, or its size contradicts its shape.
    """
    with _reading(path):
        info = archive.getinfo(f"{name}.npy")
        with archive.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = reader(stream)
            text = dtype.kind == "U" and shape == () and dtype.itemsize <= _MAX_TEXT
            if not text and (dtype.kind not in _KINDS or dtype.itemsize > _MAX_NUMBER):
                raise EvaluationError(f"'{name}' of {path} is {dtype} of shape {shape}; save plain numbers.")
            if min(shape, default=0) < 0 or stream.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
                raise EvaluationError(
                    f"'{name}' of {path} is damaged (its size contradicts its shape); write it again."
                )
            yield stream, shape, fortran_order, dtype


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (EvaluationError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise EvaluationError(f"There is no {path}; give an existing .npz file.") from error
    except Exception as error:  # zip and npy readers raise any type on damaged bytes
        reason = str(error).rstrip(".") or type(error).__name__
        raise EvaluationError(f"{path} is no readable .npz file ({reason}); write it again.") from error
