"""From a run to files of images: drawn by any number of processes, kept as they are done, written at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vrpo.files import write_text
from vrpo.processes import World
from vrpo.sampling.chunks import Chunks
from vrpo.sampling.files import (
    RECORD,
    check_png_folder,
    image_format,
    remove_pngs,
    write_grid,
    write_npz,
    write_pngs,
)
from vrpo.sampling.labels import LabelPolicy
from vrpo.sampling.source import RunSampler


@dataclass(frozen=True)
class Order:
    """Which images: how many, by which seed, of which classes (none named: all)."""

    count: int
    seed: int = 0
    labels: LabelPolicy = "balanced"
    classes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outputs:
    """Where they go: ``out`` is a folder of PNG files, an npz or a grid of all; ``npz`` and ``grid`` come beside it.

    ``grid`` shows the first images, ``columns`` rows of ``columns`` at most.
    """

    out: Path
    npz: Path | None = None
    grid: Path | None = None
    columns: int = 8


def draw_images(
    source: RunSampler,
    order: Order,
    outputs: Outputs,
    world: World,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Draw the images of ``order``, dividing what is missing between the processes of ``world``, and write them.

    Every image is the same whatever the number of processes, and memory holds one chunk of them a process. What is
    drawn is kept in a hidden folder beside ``outputs.out`` until everything is written, and taken up from there.

    Raises:
        ConfigError: the output is a folder of something else, or other settings were interrupted there.
        OSError: no space is left; what was drawn stays.
    """
    sampler = source.sampler
    about = source.about(order.labels, order.seed, order.classes) | {"count": order.count}
    chunks = Chunks(outputs.out, about, order.count, sampler.compute_batch)

    def begin() -> list[range]:
        if image_format(outputs.out) == "folder" and not chunks.started:
            check_png_folder(outputs.out)
        chunks.open()
        share = -(-order.count // world.size)
        return chunks.missing(min(sampler.settings.batch_size, share))

    missing = world.ask_first(begin)
    labels = source.labels(order.count, order.labels, order.seed, order.classes)

    def tell(own: int) -> None:
        progress(sum(map(len, chunks.saved())) + own, order.count)

    with world.agreed():  # all go on when every process is done with its own
        for part in missing[world.rank :: world.size]:
            world.stop_if_failed()
            tell(0)
            chosen = None if labels is None else labels[part.start : part.stop]
            images = torch.cat(list(sampler.batches(part, chosen, order.seed, tell)))
            chunks.save(part.start, images.permute(0, 2, 3, 1).contiguous().numpy())
    if world.size > 1:
        tell(0)
    record = json.dumps({**about, "images": source.loaded.images, "run": source.loaded.config.name}, indent=1)
    kind = image_format(outputs.out)
    if kind == "folder":
        _write_folder(chunks, outputs.out, record, world)
    with world.agreed():
        if world.first:
            if kind == "folder":
                write_text(outputs.out / RECORD, record + "\n")
            for path in (outputs.out if kind == "npz" else None, outputs.npz):
                if path is not None:
                    write_npz(iter(chunks), (order.count, *chunks.first(1).shape[1:]), labels, path, record)
            if kind == "png":
                _write_grid(chunks, outputs.out, order.count, outputs.columns)
            if outputs.grid is not None:
                _write_grid(chunks, outputs.grid, min(order.count, outputs.columns**2), outputs.columns)
            chunks.remove()


def _write_folder(chunks: Chunks, folder: Path, record: str, world: World) -> None:
    """Write the PNG files, each process those of its share of the chunks."""
    with world.agreed():
        if world.first:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RECORD).unlink(missing_ok=True)
            remove_pngs(folder, chunks.count)
    with world.agreed():
        write_pngs(_numbered(chunks, chunks.saved()[world.rank :: world.size]), folder)


def _numbered(chunks: Chunks, parts: Sequence[range]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    for part in parts:
        yield from zip(part, chunks.load(part), strict=True)


def _write_grid(chunks: Chunks, out: Path, count: int, columns: int) -> None:
    images: Any = chunks.first(count)
    write_grid(torch.from_numpy(images).permute(0, 3, 1, 2), out, columns)
