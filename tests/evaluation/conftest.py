"""Fixtures of the evaluation tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor


class StubNetwork:
    """A feature network that averages blocks of pixels: cheap, and a function of the image alone."""

    name = "stub"
    weights_hash = "0" * 64
    input_size = 8

    def __init__(self) -> None:
        self.images_seen = 0

    def pooled(self, images: Tensor) -> Tensor:
        self.images_seen += len(images)
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 3).flatten(1)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def network() -> StubNetwork:
    return StubNetwork()
