"""The noise of a sample depends on the seed and the sample's index alone."""

from __future__ import annotations

import pytest
import torch

from vrpo.diffusion.noise import SampleNoise

SHAPE = (3, 8, 8)


@pytest.mark.parametrize("split", [1, 2, 5])
def test_noise_is_the_same_whatever_the_batch(split: int) -> None:
    indices = [7, 0, 3, 12, 5]
    whole = SampleNoise(1, indices, SHAPE)
    parts = [SampleNoise(1, indices[start : start + split], SHAPE) for start in range(0, 5, split)]
    assert torch.equal(whole.initial(), torch.cat([part.initial() for part in parts]))
    for _ in range(3):
        assert torch.equal(whole.step(), torch.cat([part.step() for part in parts]))


def test_seeds_samples_and_steps_differ() -> None:
    one, other = SampleNoise(1, range(4), SHAPE), SampleNoise(2, range(4), SHAPE)
    draws = torch.cat([one.initial(), one.step(), one.step(), other.initial(), other.step()]).flatten(1)
    correlation = torch.corrcoef(draws) - torch.eye(len(draws))
    assert correlation.abs().max() < 0.4


def test_the_initial_noise_does_not_depend_on_the_steps_drawn() -> None:
    noise, fresh = SampleNoise(1, [4], SHAPE), SampleNoise(1, [4], SHAPE)
    first = noise.initial()
    noise.step()
    assert torch.equal(noise.initial(), first)
    fresh.step()
    assert torch.equal(noise.step(), fresh.step())


def test_noise_is_unit_gaussian_float32() -> None:
    noise = SampleNoise(0, range(64), SHAPE)
    for draw in (noise.initial(), noise.step()):
        assert draw.dtype == torch.float32
        assert draw.shape == (64, *SHAPE)
        assert abs(float(draw.mean())) < 0.03
        assert abs(float(draw.std()) - 1) < 0.03
