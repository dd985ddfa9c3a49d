"""The three ways to a data set with latents, each small enough to be interrupted many times over."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from autoencoder_files import save_autoencoder
from latent_sources import write_lightning, write_repa
from vrpo.data.latents import LatentOptions
from vrpo.data.prepare import PrepareResult, prepare
from vrpo.data.sources import ArraySource

KINDS = ("autoencoder", "repa", "lightning")
COUNT = 12
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16, 3), dtype=np.uint8)
ROW = 3 * 16**2 + 2 * 2 * 8 * 8**2  # pixels, and both sides' mean and deviation


def write_sources(folder: Path) -> Path:
    """Write an autoencoder, and what REPA's and LightningDiT's tools make."""
    torch.manual_seed(0)
    autoencoder = save_autoencoder(folder / "kl")
    write_repa(folder / "repa", [_png(image) for image in IMAGES], autoencoder)
    write_lightning(folder / "lightning")
    return folder


def _png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def make(kind: str, sources: Path, out: Path, **options: Any) -> PrepareResult:
    """Prepare a data set of three shards or four, whose scale is that of its own channels."""
    latents = LatentOptions(normalise="channels")
    if kind == "autoencoder":
        source: Any = ArraySource(IMAGES, np.arange(COUNT) % 3, ("cat", "dog", "eel"), "noise")
        latents = LatentOptions(str(sources / "kl"), normalise="channels", batch_size=2)
        told = {"size": 16, "flip": True, "shard_bytes": 4 * ROW}
    elif kind == "repa":
        source, told = sources / "repa", {"size": 16, "shard_bytes": 4 * (3 * 16**2 + 2 * 8 * 8**2)}
    else:
        source, told = sources / "lightning", {"size": 64, "flip": True, "shard_bytes": 3 * 2 * 2 * 6 * 4**2}
    return prepare(source, out, **({"workers": 1, "progress": False, "latents": latents} | told | options))


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file's bytes by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}
