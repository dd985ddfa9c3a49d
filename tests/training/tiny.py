"""A tiny labelled set of images with structure that a small network learns."""

from __future__ import annotations

import numpy as np

CLASSES = ("bars", "dots", "waves")


def pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ``count`` noisy 16 x 16 images of three kinds, and their kinds."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    rows, columns = np.mgrid[0:16, 0:16]
    kinds = np.stack([(columns // 4) % 2, (rows % 4 < 2) & (columns % 4 < 2), np.sin(rows + columns / 2) > 0])
    images = 200 * kinds[labels].astype(float) + generator.normal(20, 12, (count, 16, 16))
    return np.repeat(images.clip(0, 255).astype(np.uint8)[..., None], 3, axis=-1), labels
