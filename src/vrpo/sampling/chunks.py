"""Images drawn so far, kept in a folder of chunks until all are there, so that an interrupted command can go on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vrpo.errors import ConfigError
from vrpo.files import replacing, write_text

_MANIFEST = "sampling.json"
_NAME = re.compile(r"(\d+)-(\d+)\.npy")


class Chunks:
    """Images 0 to ``count`` in files START-STOP.npy, uint8 (N, H, W, 3), in the hidden folder beside an output.

    Boundaries are multiples of ``group`` images, whatever the size of a chunk, so that another number of processes or
    another size of chunks can go on. A file gets its name when all of it is on disk.
    """

    def __init__(self, out: Path, about: Mapping[str, Any], count: int, group: int) -> None:
        """Take the output's path, and ``about``, all that the pixels depend on, as JSON values."""
        self.folder = out.absolute().with_name(f".{out.absolute().name}.drawing")
        self.about, self.count, self.group = dict(about), count, group

    def open(self) -> None:
        """Begin, or take up what was drawn by the same settings.

        Raises:
            ConfigError: it was drawn by other settings, or by something else; the first difference is named.
        """
        manifest = self.folder / _MANIFEST
        if not manifest.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(manifest, json.dumps(self.about, indent=1) + "\n")
            return
        try:
            known = json.loads(manifest.read_text("utf-8"))
        except ValueError:
            known = None
        if not isinstance(known, dict):
            raise ConfigError(f"{manifest} is damaged: remove {self.folder} to draw from the beginning.")
        for name in [*self.about, *known]:
            if known.get(name) != self.about.get(name):
                raise ConfigError(
                    f"{self.folder} holds unfinished images drawn with {name.replace('_', ' ')} {known.get(name)}, not "
                    f"{self.about.get(name)}: finish them with that setting, or remove that folder."
                )

    @property
    def started(self) -> bool:
        """Whether an unfinished command left something here."""
        return (self.folder / _MANIFEST).is_file()

    def save(self, start: int, images: NDArray[np.uint8]) -> None:
        """Keep images ``start``, ``start + 1``, ..., (N, H, W, 3)."""
        path = self.folder / f"{start:08d}-{start + len(images):08d}.npy"
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(images))
            file.write(np.ascontiguousarray(images).data)

    def saved(self) -> list[range]:
        """Return the images that are there, chunk by chunk in their order."""
        names = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted((range(int(name[1]), int(name[2])) for name in names if name), key=lambda part: part.start)

    def missing(self, size: int) -> list[range]:
        """Return what is still to be drawn, in parts of about ``size`` images that begin and end with a group."""
        groups = range(-(-self.count // self.group))
        there = {index // self.group for part in self.saved() for index in part[:: self.group]}
        most = max(1, size // self.group)
        parts: list[range] = []
        for group in groups:
            if group in there:
                continue
            start, stop = group * self.group, min((group + 1) * self.group, self.count)
            if parts and parts[-1].stop == start and len(parts[-1]) < most * self.group:
                parts[-1] = range(parts[-1].start, stop)
            else:
                parts.append(range(start, stop))
        return parts

    def load(self, part: range) -> NDArray[np.uint8]:
        """Return the images of one chunk, (N, H, W, 3), mapped from its file."""
        return np.load(self.folder / f"{part.start:08d}-{part.stop:08d}.npy", mmap_mode="r", allow_pickle=False)

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """Yield all images in their order, chunk by chunk."""
        for part in self.saved():
            yield self.load(part)

    def first(self, count: int) -> NDArray[np.uint8]:
        """Return the first ``count`` images, (N, H, W, 3)."""
        parts: list[NDArray[np.uint8]] = []
        for chunk in self:
            parts.append(chunk[: count - sum(map(len, parts))])
            if sum(map(len, parts)) == count:
                break
        return np.concatenate(parts)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)
