"""Images made up for the data tests, and their encodings."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def noise_image(seed: int, width: int, height: int) -> Image.Image:
    """An RGB image of smooth noise."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, size=(5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    """The image as a file's bytes."""
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()
