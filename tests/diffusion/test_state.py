"""A state's parts keep their shapes and values, and samplers treat each as if it were alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vrpo.diffusion.noise import SampleNoise
from vrpo.diffusion.paths import get_path
from vrpo.diffusion.samplers import FLOW_SAMPLERS, sample
from vrpo.diffusion.state import Layout, State

LAYOUT = Layout((3, 4, 4), 16)


def test_split_undoes_join() -> None:
    state = State(torch.randn(2, 3, 4, 4), torch.randn(2, 16))
    image, token = LAYOUT.split(LAYOUT.join(state))
    assert torch.equal(image, state.image)
    assert torch.equal(token, state.token)


def test_one_part_is_left_as_it_is() -> None:
    image = torch.randn(2, 3, 4, 4)
    alone = Layout((3, 4, 4))
    assert alone.shape == (3, 4, 4)
    assert alone.join(State(image)) is image
    assert alone.split(image) == State(image)


class Prepared:
    """Step noise drawn beforehand."""

    def __init__(self, noise: list[Tensor]) -> None:
        self.noise, self.generators = iter(noise), []

    def step(self) -> Tensor:
        return next(self.noise)


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_each_part_moves_as_if_it_were_alone(sampler: str) -> None:
    """With a velocity that acts on each number by itself, guidance included, the image is that of the image alone."""

    def velocity(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        column = (-1, *[1] * (x.ndim - 1))
        return torch.tanh(x) * (1 + labels.view(column)) - t.view(column)

    def draw(noise: list[Tensor]) -> Tensor:
        return sample(
            velocity, noise[0], torch.tensor([0, 1]), path=get_path("linear"), sampler=sampler, steps=5,
            guidance_scale=1.5, null_label=2, noise_source=Prepared(noise[1:]),
        )  # fmt: skip

    source = SampleNoise(3, [0, 1], LAYOUT.shape)
    noise = [source.initial(), *(source.step() for _ in range(5))]
    joined = LAYOUT.split(draw(noise))
    assert torch.equal(joined.image, draw([LAYOUT.split(part).image for part in noise]))
    assert joined.token is not None
    assert joined.token.shape == (2, 16)
    assert joined.token.std() > 0
