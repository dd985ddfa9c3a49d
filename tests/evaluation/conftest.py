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


class StubInception(StubNetwork):
    """The same with the name and the abilities of Inception."""

    name = "inception"

    def pooled_and_spatial(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.pooled(images), images[:, :, 0, :2].float().flatten(1)

    def logits(self, pooled: Tensor) -> Tensor:
        return pooled[:, :5] / 16


@pytest.fixture
def inception() -> StubInception:
    return StubInception()


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def network() -> StubNetwork:
    return StubNetwork()
