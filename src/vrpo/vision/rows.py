"""What the vision package needs of a prepared data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor


class ImageRows(Protocol):
    """A data set of equally sized images that is read by row number."""

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 means unlabelled."""

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes, by label."""

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels."""

    @property
    def fingerprint(self) -> str:
        """Text that changes when any pixel or label does."""

    def __len__(self) -> int:
        """Return the number of images."""

    def read(self, indices: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Return the uint8 images (B, 3, H, W) and int64 labels (B,) of int64 row numbers (B,)."""
