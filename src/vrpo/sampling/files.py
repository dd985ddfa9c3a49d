"""Images on disk: one PNG a sample, a grid, or the ADM evaluator's npz; never JPEG."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vrpo.errors import ConfigError
from vrpo.files import replacing

RECORD = "sampling.json"
"""Beside the PNG files: how they were drawn."""

_PNG_NAME = re.compile(r"\d{6,}\.png")


def image_format(out: Path) -> Literal["png", "npz", "folder"]:
    """Return what a path stands for: a grid (.png), an npz, or a folder of PNG files.

    Raises:
        ConfigError: a file of another kind.
    """
    if out.suffix in ("", ".png", ".npz") or out.is_dir():
        return {".png": "png", ".npz": "npz"}.get(out.suffix, "folder")  # type: ignore[return-value]
    raise ConfigError(f"--out {out} is neither a folder nor .png nor .npz: choose one of the three.")


def check_png_folder(folder: Path) -> None:
    """Refuse a folder that holds anything but images of an earlier `write_pngs`, which may be replaced.

    Raises:
        ConfigError: what else is there.
    """
    if not folder.is_dir():
        return
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if name != RECORD and not _PNG_NAME.fullmatch(name)]
    # Numbered files without a record may be anybody's.
    if names and RECORD not in names:
        others = others or names
    if others:
        raise ConfigError(f"--out {folder} holds '{others[0]}', which vrpo sample did not write: give another folder.")


def write_pngs(images: Iterable[tuple[int, NDArray[np.uint8]]], folder: Path, workers: int | None = None) -> None:
    """Write numbered images (H, W, 3) as ``NNNNNN.png``, several at a time."""
    from PIL import Image

    def write(item: tuple[int, NDArray[np.uint8]]) -> None:
        index, pixels = item
        Image.fromarray(pixels).save(folder / f"{index:06d}.png")

    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
        for _ in pool.map(write, images):
            pass


def remove_pngs(folder: Path, first: int) -> None:
    """Remove the numbered images from ``first`` on, which an earlier, larger set has left."""
    for path in folder.iterdir():
        if _PNG_NAME.fullmatch(path.name) and int(path.stem) >= first:
            path.unlink()


def write_npz(
    batches: Iterable[NDArray[np.uint8]], shape: Sequence[int], labels: Tensor | None, out: Path, record: str
) -> None:
    """Write images in the ADM evaluator's layout, whole or not at all, one batch in memory at a time.

    ``arr_0`` are the pixels, uint8 of ``shape`` (N, H, W, 3), ``arr_1`` the labels (N,) where there are any; the array
    ``sampling``, a string which that evaluator does not read, says how they were drawn.
    """
    with replacing(out) as unfinished, zipfile.ZipFile(unfinished, "w", allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            header: dict[str, Any] = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_1_0(stream, header)
            for batch in batches:
                stream.write(np.ascontiguousarray(batch).data)
        more = {"sampling": np.array(record)} | ({} if labels is None else {"arr_1": labels.numpy()})
        for name, array in more.items():
            with archive.open(f"{name}.npy", "w") as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)


def write_grid(images: Tensor, out: Path, columns: int) -> None:
    """Write uint8 images (B, 3, H, W) as one PNG picture."""
    from PIL import Image

    with replacing(out) as unfinished:
        Image.fromarray(grid_image(images, columns)).save(unfinished, format="PNG")


def grid_image(images: Tensor, columns: int) -> np.ndarray:
    """Arrange uint8 images (B, 3, H, W) row by row into one array (rows*H, columns*W, 3), with a 1 px gap."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.full((rows, columns, channels, height + 1, width + 1), 255, dtype=torch.uint8)
    sheet.view(-1, channels, height + 1, width + 1)[:count, :, :-1, :-1] = images
    return sheet.permute(0, 3, 1, 4, 2).reshape(rows * (height + 1), columns * (width + 1), channels)[:-1, :-1].numpy()
