"""Latents that others prepared: REPA's ``images/`` and ``vae-sd/``, and LightningDiT's safetensors shards.

REPA's tools write ``images/00000/img00000007.png`` and ``vae-sd/00000/img-mean-std-00000007.npy``, mean and standard
deviation of the posterior as float (2C, h, w), with labels by file name in ``vae-sd/dataset.json``. LightningDiT's
write ``*.safetensors`` with ``latents`` and ``latents_flip`` (n, C, h, w), one sample of the posterior each, and
``labels`` (n,), with channel statistics in ``latents_stats.pt``.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from vrpo.data.manifest import MANIFEST
from vrpo.data.sources import IMAGE_SUFFIXES, Entry, Source, StoredLatents, printable_name, walk
from vrpo.data.tensors import Place, as_float, read_header, read_tensor
from vrpo.errors import DataError
from vrpo.untrusted import read_json

_REPA_FEATURES = "vae-sd"
_REPA_SCALE = 0.18215
_STATISTICS = "latents_stats.pt"
_FLOATS = ("F16", "BF16", "F32")


def is_repa_folder(path: Path) -> bool:
    """Whether a folder is laid out as REPA's preprocessing leaves it."""
    return (path / _REPA_FEATURES).is_dir()


def is_latent_folder(path: Path) -> bool:
    """Whether a folder holds LightningDiT's latents."""
    if not path.is_dir() or (path / MANIFEST).is_file():
        return False
    first = next(iter(sorted(path.glob("*.safetensors"))), None)
    try:
        return first is not None and "latents" in read_header(first)
    except (OSError, ValueError):
        return True  # damaged, which opening it says


@dataclass
class RepaOpener:
    """Reads an image and its latents below a folder; a location is the two relative paths."""

    root: Path
    shape: tuple[int, int, int]

    def connect(self) -> None:
        """Check that the folder is still there."""
        os.stat(self.root)

    def open(self, entry: Entry) -> BinaryIO:
        """Open one image."""
        return open(self.root / cast("tuple[str, str]", entry.location)[1], "rb")

    def latents(self, entry: Entry) -> NDArray[np.float16]:
        """Return mean and standard deviation, (1, 2C, h, w)."""
        content = (self.root / cast("tuple[str, str]", entry.location)[0]).read_bytes()
        stream = io.BytesIO(content)
        shape, dtype = _npy_header(stream)
        if shape != self.shape:
            raise DataError(f"its latents are {shape} and not {self.shape} like the first")
        data = content[stream.tell() :]
        if len(data) != int(np.prod(shape)) * dtype.itemsize:
            raise DataError("its latents are cut off")
        return _half(np.frombuffer(data, dtype).reshape(1, *shape))


def open_repa(path: Path) -> Source:
    """List the latents of REPA's layout, each with its image, where there are images, and its label.

    Raises DataError that names the first latent, image or label without its counterpart.
    """
    features = {_repa_key(name): name for name, _ in walk(path / _REPA_FEATURES) if name.endswith(".npy")}
    if not features:
        raise DataError(f"'{path / _REPA_FEATURES}' holds no .npy files: give a folder with REPA's latents.")
    labels = _repa_labels(path / _REPA_FEATURES / "dataset.json")
    sizes: dict[str, int] = {}
    images: dict[str, str] = {}
    if (path / "images").is_dir():
        for name, size in walk(path / "images"):
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                images[_repa_key(name)], sizes[_repa_key(name)] = name, size
        _match(path, "latent", features, "image", images)
    if labels is not None:
        _match(path, "latent", features, "label", labels)
    keys = sorted(features, key=str.encode)
    first = path / _REPA_FEATURES / features[keys[0]]
    try:
        with open(first, "rb") as stream:
            shape, _ = _npy_header(stream)
    except (DataError, OSError) as error:
        raise DataError(f"'{first}' cannot be used: {error}.") from error
    if len(shape) != 3 or shape[0] % 2 or shape[1] != shape[2]:
        raise DataError(f"'{first}' has the shape {shape}: REPA's latents are (2C, h, h), mean and standard deviation.")
    entries = [
        Entry(
            key,
            None if labels is None else labels[key],
            sizes.get(key, 0),
            (f"{_REPA_FEATURES}/{features[key]}", f"images/{images[key]}" if images else ""),
        )
        for key in keys
    ]
    names = () if labels is None else tuple(map(str, range(max(labels.values()) + 1)))
    channels = shape[0] // 2
    stored = StoredLatents(
        shape=(1, *shape),
        posterior=True,
        pixels=bool(images),
        autoencoder="sd-vae-ft-mse",  # the default of REPA's tool
        shift=(0.0,) * channels,
        scale=(_REPA_SCALE,) * channels,
    )
    return Source("REPA", path, names, entries, 0, RepaOpener(path, shape), stored)


def _repa_key(name: str) -> str:
    """Return what an image and its latents have in common: the path without its suffix and kind."""
    return os.path.splitext(printable_name(name).replace(os.sep, "/"))[0].replace("img-mean-std-", "img")


def _repa_labels(file: Path) -> dict[str, int] | None:
    try:
        told = read_json(file)["labels"]
        if told is None:
            return None
        labels = {_repa_key(str(name)): label for name, label in told}
        if not all(type(label) is int and 0 <= label < 10_000_000 for label in labels.values()):
            raise ValueError("a label is no class number")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"'{file}' is damaged or holds no labels by file name: write it again.") from error
    return labels


def _match(path: Path, one: str, left: Iterable[str], other: str, right: Iterable[str]) -> None:
    alone = sorted(set(left) ^ set(right), key=str.encode)
    if alone:
        has, lacks = (one, other) if alone[0] in set(left) else (other, one)
        raise DataError(
            f"'{path}' has the {has} '{alone[0]}' and no {lacks} of that name ({len(alone):,} in all do not match): "
            "complete it, or prepare it from the images."
        )


def _npy_header(stream: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(stream)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = reader(stream)
    except (ValueError, EOFError) as error:
        raise DataError("its latents are no .npy file") from error
    if fortran_order or dtype.kind != "f":
        raise DataError(f"its latents are {dtype}{' in Fortran order' * fortran_order} and not rows of floats")
    return shape, dtype


def _half(values: NDArray[Any]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise DataError("its latents are not finite in half precision")
    return half


@dataclass
class LatentShardOpener:
    """Reads rows of safetensors files; a location is file and row."""

    paths: Sequence[Path]
    views: tuple[str, ...]

    def __post_init__(self) -> None:
        self._header: tuple[int, dict[str, Place]] | None = None

    def connect(self) -> None:
        """Check that the first file is still there."""
        os.stat(self.paths[0])

    def open(self, entry: Entry) -> BinaryIO:
        """Raise DataError: there are no images."""
        raise DataError("there are latents only")

    def latents(self, entry: Entry) -> NDArray[np.float16]:
        """Return the latents of a row and of its mirror image, (views, C, h, w)."""
        number, row = cast("tuple[int, int]", entry.location)
        if self._header is None or self._header[0] != number:
            self._header = (number, read_header(self.paths[number]))
        places = self._header[1]
        rows = [
            as_float(read_tensor(self.paths[number], places[name], row, row + 1), places[name].dtype)
            for name in self.views
        ]
        return _half(np.concatenate(rows))


def open_latent_shards(path: Path) -> Source:
    """List the rows of LightningDiT's latent shards; a key is FILE/ROW.

    Raises DataError for a file that is damaged or of another shape than the first.
    """
    paths = sorted(path.glob("*.safetensors"), key=lambda file: file.name)
    entries: list[Entry] = []
    first: dict[str, Place] = {}
    views: tuple[str, ...] = ()
    for number, file in enumerate(paths):
        try:
            places = read_header(file)
        except (OSError, ValueError) as error:
            raise DataError(f"'{file}' is a damaged or incomplete safetensors file: fetch it again.") from error
        first = first or places
        views = views or tuple(name for name in ("latents", "latents_flip") if name in places)
        _check_shard(file, places, first, views)
        labels: list[int | None] = [None] * places["latents"].shape[0]
        if "labels" in places:
            labels = read_tensor(file, places["labels"]).tolist()
        size, checksum = places["latents"].row_bytes, _checksum(file)
        for row, label in enumerate(labels):
            entries.append(Entry(f"{file.name}/{row:06d}", label, size, (number, row), checksum))
    known = [entry.label for entry in entries if entry.label is not None]
    if known and (min(known) < 0 or max(known) >= 10_000_000):
        raise DataError(f"'{path}' has a label that is no class number: write its shards again.")
    names = tuple(map(str, range(max(known) + 1))) if known else ()
    channels, grid, _ = first["latents"].shape[1:]
    shift, scale = _statistics(path / _STATISTICS, channels)
    stored = StoredLatents(
        shape=(len(views), channels, grid, grid), posterior=False, pixels=False, shift=shift, scale=scale
    )
    return Source("LightningDiT", path, names, entries, 0, LatentShardOpener(paths, views), stored)


def _check_shard(file: Path, places: dict[str, Place], first: dict[str, Place], views: tuple[str, ...]) -> None:
    rows = places["latents"].shape[0] if "latents" in places and places["latents"].shape else 0
    for name in views:
        place = places.get(name)
        square = place is not None and len(place.shape) == 4 and place.shape[2] == place.shape[3]
        if place is None or not square or place.dtype not in _FLOATS or place.shape[0] != rows or rows == 0:
            raise DataError(f"'{file}' holds no '{name}' of shape (n, C, h, h) for all its rows: write it again.")
        if place.shape[1:] != first["latents"].shape[1:]:
            raise DataError(
                f"the latents of '{file}' are {place.shape[1:]} and those of the first file "
                f"{first['latents'].shape[1:]}: prepare each kind by itself."
            )
    label = places.get("labels")
    if (label is None) != ("labels" not in first) or (label is not None and label.shape != (rows,)):
        raise DataError(f"'{file}' does not hold one label for each of its rows, as others do: write it again.")


def _statistics(file: Path, channels: int) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return shift and scale of LightningDiT's channel statistics, or None where they are not there."""
    if not file.is_file():
        return None, None
    import torch

    try:
        told = torch.load(file, map_location="cpu", weights_only=True)
        mean, deviation = (told[name].double().reshape(channels) for name in ("mean", "std"))
    except Exception as error:  # torch raises errors of pickle, zipfile and its own
        raise DataError(f"'{file}' holds no mean and std of {channels} channels: delete it.") from error
    if not torch.isfinite(mean).all() or not (deviation > 0).all():
        raise DataError(f"'{file}' holds a mean that is not finite or a std that is not positive: delete it.")
    return tuple(mean.tolist()), tuple((1 / deviation).tolist())


def _checksum(file: Path) -> int:
    """Hash the beginning and the end of a file, to notice that it is another."""
    with open(file, "rb") as stream:
        head = stream.read(1 << 16)
        stream.seek(max(0, file.stat().st_size - (1 << 16)))
        return zlib.crc32(stream.read(), zlib.crc32(head))
