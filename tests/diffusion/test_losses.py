"""Losses against independent computations, and the coverage of training times."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from vrpo.diffusion.losses import FlowMatching, NoisePrediction, mean_square, stratify, variational_bound
from vrpo.diffusion.paths import DiscretePath, get_path
from vrpo.errors import ConfigError


def _batch(count: int) -> tuple[Tensor, Tensor]:
    data, noise = torch.randn(2, count, 3, 4, 4, dtype=torch.float64)
    return data, noise


@pytest.mark.parametrize("name", ["linear", "cosine", "vp"])
def test_flow_matching_loss_is_zero_at_the_target_and_the_mean_square_elsewhere(name: str) -> None:
    process = FlowMatching(get_path(name))
    data, noise = _batch(6)
    t = torch.rand(6, dtype=torch.float64)
    h = 1e-6
    ahead, behind = (process.noised(data, noise, t + s) for s in (h, -h))
    target = (ahead - behind) / (2 * h)
    assert process.loss(target, data, noise, t).max() < 1e-8
    loss = process.loss(target + 2, data, noise, t)
    torch.testing.assert_close(loss, torch.full((6,), 4.0, dtype=torch.float64), rtol=1e-4, atol=0)


def test_mean_square_is_per_sample() -> None:
    difference = torch.arange(12.0).reshape(2, 3, 2)
    expected = [float((part.numpy() ** 2).mean()) for part in difference]
    assert mean_square(difference).tolist() == pytest.approx(expected)


def test_one_step_prediction_recovers_the_data() -> None:
    data, noise = _batch(6)
    flow, dit = FlowMatching(get_path("cosine")), NoisePrediction()
    t = torch.rand(6, dtype=torch.float64)
    x = flow.noised(data, noise, t)
    torch.testing.assert_close(flow.predict_data(flow.path.velocity(data, noise, t), x, t), data)
    steps = torch.tensor([0, 1, 250, 500, 750, 999])
    x = dit.noised(data, noise, steps)
    output = torch.cat([noise, torch.randn_like(noise)], dim=1)
    torch.testing.assert_close(dit.predict_data(output, x, steps), data)


def test_stratified_numbers_put_one_in_every_part_for_every_image() -> None:
    spread = stratify(torch.rand(50 * 8), 8).reshape(50, 8)
    assert torch.equal((spread * 8).floor(), torch.arange(8.0).expand(50, 8))
    assert torch.equal(stratify(torch.tensor([0.25, 0.5]), 1), torch.tensor([0.25, 0.5]))


def test_uniform_times_are_the_uniforms_and_dit_times_cover_every_step() -> None:
    uniforms = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    assert torch.equal(FlowMatching(get_path("linear")).times(uniforms), uniforms.float())
    process = NoisePrediction()
    times = process.times(uniforms)
    assert torch.equal(times.unique(), torch.arange(1000.0))
    assert process.times(torch.tensor([0.0, 1.0])).tolist() == [0.0, 999.0]
    assert process.unit_time(torch.tensor([0.0, 999.0])).tolist() == [0.0, 1.0]


def test_logit_normal_times_have_gaussian_logits() -> None:
    uniforms = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    times = FlowMatching(get_path("linear"), "logit-normal", time_mean=-0.4, time_std=1.3).times(uniforms)
    logits = torch.logit(times.double()).numpy()
    assert stats.kstest(logits, stats.norm(-0.4, 1.3).cdf).statistic < 1e-3
    ends = FlowMatching(get_path("linear"), "logit-normal").times(torch.tensor([0.0, 1.0]))
    assert ends.tolist() == [0.0, 1.0]


def test_an_unknown_time_distribution_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'logit-normal'"):
        FlowMatching(get_path("linear"), "logitnormal")  # type: ignore[arg-type]


def _posterior(data: Tensor, x: Tensor, beta: float, bar: float, previous: float) -> tuple[Tensor, float]:
    """Mean and variance of q(x_{t-1} | x_t, x_0) by Bayes' rule for Gaussians."""
    forward, prior = (1 - beta) / beta, 1 / (1 - previous)
    variance = 1 / (forward + prior)
    return variance * (forward * x / math.sqrt(1 - beta) + prior * math.sqrt(previous) * data), variance


@pytest.mark.parametrize("t", [1, 2, 40, 500, 999])
def test_bound_is_the_divergence_of_two_gaussians(t: int) -> None:
    betas = np.linspace(1e-4, 0.02, 1000)
    bars = np.cumprod(1 - betas)
    data, noise = _batch(3)
    prediction, position = torch.randn(2, 3, 3, 4, 4, dtype=torch.float64)
    x = math.sqrt(bars[t]) * data + math.sqrt(1 - bars[t]) * noise
    predicted_data = (x - math.sqrt(1 - bars[t]) * prediction) / math.sqrt(bars[t])
    q_mean, q_variance = _posterior(data, x, betas[t], bars[t], bars[t - 1])
    p_mean, _ = _posterior(predicted_data, x, betas[t], bars[t], bars[t - 1])
    weight = (position + 1) / 2
    p_std = torch.exp(0.5 * (weight * math.log(betas[t]) + (1 - weight) * math.log(q_variance)))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(q_mean, math.sqrt(q_variance)), torch.distributions.Normal(p_mean, p_std)
    )
    expected = expected.mean(dim=(1, 2, 3)) / math.log(2)
    steps = torch.full((3,), t)
    bound = variational_bound(DiscretePath(), prediction, position, data, noise, steps)
    torch.testing.assert_close(bound, expected, rtol=1e-7, atol=1e-10)


def test_range_of_the_variance_is_that_of_diffusers() -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=1000, variance_type="learned_range")
    path = DiscretePath()
    zeros = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for t in (1, 30, 999):
        for position in (-1.0, 0.3, 1.0):
            value = torch.full_like(zeros, position)
            log_variance = scheduler._get_variance(t, predicted_variance=value)
            ratio = torch.log(path.tables.posterior_variances[t]) - log_variance
            expected = 0.5 * (ratio.exp() - 1 - ratio) / math.log(2)
            bound = variational_bound(path, zeros, value, zeros, zeros, torch.tensor([t]))
            # diffusers' tables are float32.
            torch.testing.assert_close(bound, expected.flatten(), rtol=2e-2, atol=1e-5)


def test_step_zero_is_the_likelihood_of_the_256_levels() -> None:
    path = DiscretePath()
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    data = levels.reshape(256, 1, 1, 1)
    noise = torch.randn_like(data)
    prediction, position = noise + 0.3 * torch.randn_like(noise), torch.rand_like(noise)
    bound = variational_bound(path, prediction, position, data, noise, torch.zeros(256, dtype=torch.int64))

    beta = 1e-4
    x = math.sqrt(1 - beta) * data + math.sqrt(beta) * noise
    mean = ((x - math.sqrt(beta) * prediction) / math.sqrt(1 - beta)).flatten().numpy()
    weight = ((position + 1) / 2).flatten().numpy()
    smallest = float(path.tables.posterior_variances[1])
    std = np.exp(0.5 * (weight * math.log(beta) + (1 - weight) * math.log(smallest)))
    for index in (0, 1, 100, 254, 255):
        low = -np.inf if index == 0 else float(levels[index]) - 1 / 255
        high = np.inf if index == 255 else float(levels[index]) + 1 / 255
        mass, _ = integrate.quad(stats.norm(mean[index], std[index]).pdf, low, high, epsabs=1e-13)
        assert float(bound[index]) == pytest.approx(-math.log2(mass), rel=1e-6, abs=1e-9)


def test_bound_is_finite_with_finite_gradients_in_float32_at_every_step() -> None:
    steps = torch.arange(1000)
    data, noise = torch.randn(2, 1000, 2, 2, 2).unbind()
    output = torch.randn(1000, 4, 2, 2, requires_grad=True)
    loss = NoisePrediction().loss(output, data, noise, steps)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert output.grad is not None
    assert output.grad.isfinite().all()


def test_the_bound_does_not_train_the_mean() -> None:
    process = NoisePrediction()
    data, noise = _batch(4)
    output = torch.randn(4, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    steps = torch.tensor([0, 10, 500, 999])
    process.loss(output, data, noise, steps).sum().backward()
    assert output.grad is not None
    squared_error_gradient = 2 * (output.detach()[:, :3] - noise) / noise[0].numel()
    torch.testing.assert_close(output.grad[:, :3], squared_error_gradient)
    assert (output.grad[1:, 3:] != 0).all()


def test_loss_is_the_squared_error_plus_the_bound_with_weight_one() -> None:
    process = NoisePrediction()
    data, noise = _batch(4)
    output = torch.randn(4, 6, 4, 4, dtype=torch.float64)
    steps = torch.tensor([0, 10, 500, 999])
    bound = variational_bound(process.path, output[:, :3], output[:, 3:], data, noise, steps)
    expected = ((output[:, :3] - noise) ** 2).mean(dim=(1, 2, 3)) + bound
    torch.testing.assert_close(process.loss(output, data, noise, steps), expected)
