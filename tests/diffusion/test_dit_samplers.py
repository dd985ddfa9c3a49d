"""DDPM and DDIM samplers of a DiT on Gaussian data, whose noise prediction is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vrpo.diffusion.noise import SampleNoise
from vrpo.diffusion.paths import DiscretePath
from vrpo.diffusion.samplers import DIT_SAMPLERS, sample_dit


@pytest.mark.parametrize(
    ("sampler", "interval", "guided"),
    [
        ("ddpm", (111, 555), [555, 444, 333, 222, 111]),
        ("ddpm", (112, 554), [444, 333, 222]),
        ("ddim", (100, 500), [500, 400, 300, 200, 100]),
        ("ddim", (101, 499), [400, 300, 200]),
    ],
)
def test_a_dits_guidance_interval_includes_its_ends(sampler: str, interval: tuple[int, int], guided: list[int]) -> None:
    calls: list[tuple[int, list[int]]] = []

    def network(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        calls.append((int(t[0]), labels.tolist()))
        return torch.cat([x, x], dim=1)

    source = SampleNoise(0, range(2), (1, 2, 2))
    sample_dit(
        network,
        source.initial(),
        torch.tensor([0, 1]),
        sampler=sampler,
        steps=10,
        guidance_scale=2.0,
        guidance_interval=(interval[0] / 999, interval[1] / 999),
        null_label=9,
        noise_source=source,
    )
    assert [t for t, labels in calls if labels == [0, 1, 9, 9]] == guided
    assert all(labels == [0, 1] for t, labels in calls if t not in guided)
    assert len(calls) == 10


@pytest.mark.parametrize("sampler", DIT_SAMPLERS)
def test_a_dits_guidance_of_three_channels_is_that_of_its_code(sampler: str) -> None:
    """``eps, rest = out[:, :3], out[:, 3:]``: the fourth channel and the variance are the conditional half's."""
    labels = torch.tensor([0, 1])

    def network(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        out = torch.cat([x, torch.tanh(x)], dim=1)
        return 0.5 * out + 0.01 * y[:, None, None, None]

    def as_published(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        both = torch.cat([labels, torch.full_like(labels, 9)])
        out = network(torch.cat([x, x]), torch.cat([t, t]), both).double()
        conditional, null = out[:, :3].chunk(2)
        return torch.cat([null + 2.0 * (conditional - null), out[:2, 3:]], dim=1)

    images = []
    for called, options in ((network, {"guidance_scale": 2.0, "guidance_channels": 3}), (as_published, {})):
        source = SampleNoise(0, range(2), (4, 2, 2))
        options |= {"sampler": sampler, "steps": 10, "null_label": 9, "noise_source": source}
        images.append(sample_dit(called, source.initial(), labels, **options))
    assert torch.equal(*images)


SCALE, SHIFT = 0.6, 0.4


def _pixel_noise_network(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    """DiT's exact noise prediction for pixels N(SHIFT, SCALE^2), and a fixed place in the range."""
    bar = DiscretePath().tables.alpha_bars[t[0].long()]
    epsilon = (1 - bar).sqrt() * (x - bar.sqrt() * SHIFT) / (bar * SCALE**2 + 1 - bar)
    return torch.cat([epsilon, torch.full_like(x, -0.4)], dim=1)


def _dit_moments(timesteps: list[int], stochastic: bool) -> tuple[float, float]:
    """Mean and standard deviation of a pixel after DDPM (variance in its range) or DDIM, step by step."""
    bars = DiscretePath().tables.alpha_bars
    mean, variance = 0.0, 1.0
    for t, t_next in zip(timesteps, [*timesteps[1:], -1], strict=True):
        bar, bar_next = float(bars[t]), float(bars[t_next]) if t_next >= 0 else 1.0
        total = bar * SCALE**2 + 1 - bar
        # E[x_0 | x] = SHIFT + gain (x - sqrt(bar) SHIFT), and the noise follows from it.
        gain = math.sqrt(bar) * SCALE**2 / total
        noise_gain = math.sqrt(1 - bar) / total
        if stochastic:
            beta = 1 - bar / bar_next
            on_data = math.sqrt(bar_next) * beta / (1 - bar)
            on_state = math.sqrt(1 - beta) * (1 - bar_next) / (1 - bar)
            slope = on_data * gain + on_state
            smallest = beta * (1 - bar_next) / (1 - bar)
            added = math.exp(0.3 * math.log(beta) + 0.7 * math.log(smallest)) if t_next >= 0 else 0.0
        else:
            slope = math.sqrt(bar_next) * gain + math.sqrt(1 - bar_next) * noise_gain
            added = 0.0
        # Both updates map the marginal's mean sqrt(bar) SHIFT to sqrt(bar_next) SHIFT.
        mean = math.sqrt(bar_next) * SHIFT + slope * (mean - math.sqrt(bar) * SHIFT)
        variance = slope**2 * variance + added
    return mean, math.sqrt(variance)


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 250), ("ddpm", 7), ("ddim", 250), ("ddim", 8)])
def test_dit_samplers_reach_the_moments_of_the_gaussian(sampler: str, steps: int) -> None:
    source = SampleNoise(0, range(2), (1, 128, 128))
    result = sample_dit(
        _pixel_noise_network, source.initial(), None, sampler=sampler, steps=steps, noise_source=source
    ).double()
    if sampler == "ddpm":
        timesteps = [round(999 * k / (steps - 1)) for k in reversed(range(steps))]
    else:
        timesteps = list(range(0, 1000, 1000 // steps))[::-1]
    mean, std = _dit_moments(timesteps, stochastic=sampler == "ddpm")
    # Five standard errors of 32,768 pixels.
    assert float(result.mean()) == pytest.approx(mean, abs=5 * std / 181)
    assert float(result.std()) == pytest.approx(std, rel=5 / 256)
    if steps == 250:
        assert (mean, std) == (pytest.approx(SHIFT, abs=0.02), pytest.approx(SCALE, rel=0.03))


def test_ddim_is_the_exact_affine_map() -> None:
    start = SampleNoise(0, range(2), (1, 8, 8)).initial().double()
    result = sample_dit(_pixel_noise_network, start, None, sampler="ddim", steps=20)
    mean, std = _dit_moments(list(range(0, 1000, 50))[::-1], stochastic=False)
    torch.testing.assert_close(result, mean + std * start, rtol=1e-9, atol=1e-9)


def test_ddpm_visits_adms_respaced_steps() -> None:
    seen: list[float] = []

    def network(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        seen.append(float(t[0]))
        return torch.cat([x, x], dim=1)

    for steps in (250, 10, 2, 1, 1000):
        seen.clear()
        source = SampleNoise(0, [0], (1, 2, 2))
        sample_dit(network, source.initial(), None, sampler="ddpm", steps=steps, noise_source=source)
        stride, expected, place = 999 / max(steps - 1, 1), [], 0.0
        for _ in range(steps):
            expected.append(round(place))
            place += stride
        assert seen == (expected[::-1] if steps > 1 else [999])


@pytest.mark.parametrize("sampler", DIT_SAMPLERS)
def test_a_dit_sample_is_the_same_whatever_the_batch(sampler: str) -> None:
    def draw(indices: list[int]) -> Tensor:
        source = SampleNoise(3, indices, (1, 4, 4))
        return sample_dit(_pixel_noise_network, source.initial(), None, sampler=sampler, steps=5, noise_source=source)

    assert torch.equal(draw([0, 1, 2, 3]), torch.cat([draw([0, 1, 2]), draw([3])]))


def test_dit_guidance_leaves_the_variance_to_the_conditional_half() -> None:
    """With guidance the result equals that of a network which guides its noise and keeps its own variance."""
    labels = torch.tensor([1, 2])

    def network(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        level = y.to(x.dtype)[:, None, None, None]
        return torch.cat([0.1 * x * level, (0.2 * level - 0.5).expand_as(x)], dim=1)

    def guided(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        own, null = network(x, t, labels), network(x, t, torch.tensor([7, 7]))
        return torch.cat([null[:, :1] + 3 * (own[:, :1] - null[:, :1]), own[:, 1:]], dim=1)

    results = []
    for net, y, scale in ((network, labels, 3.0), (guided, None, 1.0)):
        source = SampleNoise(0, range(2), (1, 4, 4))
        results.append(
            sample_dit(
                net,
                source.initial().double(),
                y,
                sampler="ddpm",
                steps=10,
                guidance_scale=scale,
                null_label=7,
                noise_source=source,
            )
        )
    torch.testing.assert_close(results[0], results[1])
