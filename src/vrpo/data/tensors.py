"""Safetensors files by hand: written from blocks without joining them, read by row without loading them."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vrpo.untrusted import parse_json

DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("<u1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    # numpy has no bfloat16; see ``as_float``.
    "BF16": np.dtype("<u2"),
}
_MAX_HEADER = 1 << 20  # a row-wise data set has a handful of tensors


class Blocks(NamedTuple):
    """A tensor to write: its shape, type name, and the arrays that follow each other in it."""

    shape: tuple[int, ...]
    dtype: str
    blocks: Sequence[NDArray[Any]]


def file_parts(tensors: Mapping[str, Blocks]) -> list[bytes | memoryview]:
    """Return the bytes of a safetensors file in order, the blocks uncopied where they are contiguous."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * ((-len(text) - 8) % 64)  # the data starts at a multiple of 64 bytes
    parts: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text]
    for tensor in tensors.values():
        parts += [np.ascontiguousarray(block).reshape(-1).view(np.uint8).data for block in tensor.blocks]
    return parts


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its file: type name, shape, first and last byte."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry along the first axis."""
        return math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize


def read_header(file: Path) -> dict[str, Place]:
    """Return where each tensor of a safetensors file lies.

    Raises OSError where it cannot be read and ValueError where it is no such file, or cut.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(size - 8, _MAX_HEADER):
            raise ValueError("its header is longer than the file")
        text = stream.read(length)
    places = {}
    try:
        for name, entry in parse_json(text).items():
            if name == "__metadata__" or entry["dtype"] not in DTYPES:
                continue
            begin, end = (8 + length + operator.index(offset) for offset in entry["data_offsets"])
            shape = tuple(map(operator.index, entry["shape"]))
            place = Place(entry["dtype"], shape, begin, end)
            fits = 8 + length <= begin <= end <= size and min(shape, default=0) >= 0
            if not fits or end - begin != math.prod(shape) * DTYPES[place.dtype].itemsize:
                raise ValueError(f"'{name}' does not fit into the file")
            places[name] = place
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError("its header is damaged") from error
    return places


def read_tensor(file: Path, place: Place, start: int = 0, stop: int | None = None) -> NDArray[Any]:
    """Read rows ``start`` up to ``stop`` of one tensor into memory; raises ValueError for rows that are not there."""
    stop = place.shape[0] if stop is None else stop
    if not 0 <= start <= stop <= place.shape[0]:
        raise ValueError(f"rows {start} .. {stop} lie outside the tensor")
    with open(file, "rb") as stream:
        stream.seek(place.begin + start * place.row_bytes)
        data = stream.read((stop - start) * place.row_bytes)
    return np.frombuffer(data, DTYPES[place.dtype]).reshape(stop - start, *place.shape[1:])


def as_float(array: NDArray[Any], dtype: str) -> NDArray[np.floating]:
    """Return values as numpy can hold them: bfloat16 becomes float32, the others stay."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array
