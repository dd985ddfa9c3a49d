"""Small data sets in memory, as the vision package reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor


class MemoryRows:
    """Images in memory with the interface of a prepared data set; counts the rows that were read."""

    def __init__(self, images: Tensor, labels: Tensor | None) -> None:
        self.images, self.labels = images, labels
        self.num_classes = 0 if labels is None else int(labels.max()) + 1
        self.class_names = [str(label) for label in range(self.num_classes)]
        self.image_size = images.shape[-1]
        self.fingerprint = hashlib.sha256(images.numpy().tobytes()).hexdigest()
        self.rows_read: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray) -> tuple[Tensor, Tensor | None]:
        self.rows_read += indices.tolist()
        chosen = torch.from_numpy(indices)
        return self.images[chosen], None if self.labels is None else self.labels[chosen]


@pytest.fixture(scope="session")
def memory_rows() -> Callable[..., MemoryRows]:
    """The class of data sets in memory."""
    return MemoryRows


@pytest.fixture(scope="session")
def digits() -> MemoryRows:
    """scikit-learn's 1,797 handwritten digits at 16 px."""
    from sklearn.datasets import load_digits

    table = load_digits()
    images = torch.from_numpy(table.images / 16 * 255).round().to(torch.uint8)
    images = images.repeat_interleave(2, -1).repeat_interleave(2, -2)[:, None].expand(-1, 3, -1, -1).contiguous()
    return MemoryRows(images, torch.from_numpy(table.target).long())
