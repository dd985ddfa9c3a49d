"""Images on disk: one PNG a sample, a grid, or the ADM evaluator's npz; never JPEG."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vrpo.errors import ConfigError


def image_format(out: Path) -> Literal["png", "npz", "folder"]:
    """Return what ``write_images`` makes of a path.

    Raises:
        ConfigError: a file of another kind.
    """
    if out.suffix in ("", ".png", ".npz") or out.is_dir():
        return {".png": "png", ".npz": "npz"}.get(out.suffix, "folder")  # type: ignore[return-value]
    raise ConfigError(f"--out {out} is neither a folder nor .png nor .npz: choose one of the three.")


def write_images(images: Tensor, labels: Tensor | None, out: Path, columns: int) -> None:
    """Write uint8 images (B, 3, H, W) as a PNG grid, an ADM npz (``arr_0`` NHWC, ``arr_1`` labels) or a PNG folder."""
    from PIL import Image

    kind = image_format(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    pixels = images.permute(0, 2, 3, 1).numpy()
    if kind == "png":
        Image.fromarray(grid_image(images, columns)).save(out)
    elif kind == "npz":
        arrays = {"arr_0": pixels} if labels is None else {"arr_0": pixels, "arr_1": labels.numpy()}
        np.savez(out, **arrays)  # type: ignore[arg-type]
    else:
        out.mkdir(exist_ok=True)
        for index, image in enumerate(pixels):
            Image.fromarray(image).save(out / f"{index:06d}.png")


def grid_image(images: Tensor, columns: int) -> np.ndarray:
    """Arrange uint8 images (B, 3, H, W) row by row into one array (rows*H, columns*W, 3), with a 1 px gap."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.full((rows, columns, channels, height + 1, width + 1), 255, dtype=torch.uint8)
    sheet.view(-1, channels, height + 1, width + 1)[:count, :, :-1, :-1] = images
    return sheet.permute(0, 3, 1, 4, 2).reshape(rows * (height + 1), columns * (width + 1), channels)[:-1, :-1].numpy()
