"""Paths: coefficients against derivatives, and every conversion against its inverse, in float64."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from vrpo.diffusion.paths import PATH_NAMES, DiscretePath, Path, Quantity, get_path
from vrpo.errors import ConfigError

PATHS = {name: get_path(name) for name in PATH_NAMES}
ALL_PATHS = {**PATHS, "discrete": DiscretePath()}


def _times(path: Path, count: int = 40) -> Tensor:
    if isinstance(path, DiscretePath):
        return torch.linspace(0, path.steps - 1, count).round().to(torch.float64)
    return torch.linspace(1e-3, 1 - 1e-3, count, dtype=torch.float64)


def _pair(count: int) -> tuple[Tensor, Tensor]:
    data, noise = torch.randn(2, count, 3, 4, 4, dtype=torch.float64)
    return data, noise


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_are_those_of_the_coefficients(name: str) -> None:
    t = _times(PATHS[name]).requires_grad_()
    point = PATHS[name].point(t)
    for value, derivative in ((point.alpha, point.d_alpha), (point.sigma, point.d_sigma)):
        (expected,) = torch.autograd.grad(value.sum(), t, retain_graph=True, allow_unused=True)
        torch.testing.assert_close(derivative, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_agree_with_finite_differences(name: str) -> None:
    t, h = _times(PATHS[name]), 1e-6
    point, above, below = (PATHS[name].point(time) for time in (t, t + h, t - h))
    torch.testing.assert_close(point.d_alpha, (above.alpha - below.alpha) / (2 * h), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(point.d_sigma, (above.sigma - below.sigma) / (2 * h), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PATHS)
def test_ends_are_data_and_noise(name: str) -> None:
    ends = PATHS[name].point(torch.tensor([0.0, 1.0], dtype=torch.float64))
    # The variance-preserving path stops short of both ends (its smallest time, and alpha(1) = exp(-5.025)).
    tolerance = 1e-2 if name == "vp" else 1e-12
    expected = torch.tensor([1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(ends.alpha, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(ends.sigma, expected.flip(0), rtol=0, atol=tolerance)


def test_vp_follows_its_stochastic_equation() -> None:
    """alpha(t) = exp(-1/2 int beta), by numerical integration of beta(t) = 0.1 + 19.9 t."""
    t = torch.linspace(0, 1, 20001, dtype=torch.float64)
    integral = torch.cumulative_trapezoid(0.1 + 19.9 * t, t)
    point = PATHS["vp"].point(t[1:])
    torch.testing.assert_close(point.alpha, torch.exp(-0.5 * integral), rtol=1e-7, atol=0)
    torch.testing.assert_close(point.alpha**2 + point.sigma**2, torch.ones_like(integral))


@pytest.mark.parametrize(("name", "source", "target"), list(product(ALL_PATHS, Quantity, Quantity)))
def test_every_conversion_round_trips(name: str, source: Quantity, target: Quantity) -> None:
    path = ALL_PATHS[name]
    t = _times(path)
    data, noise = _pair(len(t))
    x = path.noised(data, noise, t)
    known = {
        Quantity.DATA: data,
        Quantity.NOISE: noise,
        Quantity.VELOCITY: path.velocity(data, noise, t),
        Quantity.SCORE: -noise / path.at(t, noise).sigma,
    }
    converted = path.convert(known[source], x, t, source, target)
    torch.testing.assert_close(converted, known[target], rtol=1e-9, atol=1e-9)
    back = path.convert(converted, x, t, target, source)
    torch.testing.assert_close(back, known[source], rtol=1e-9, atol=1e-9)


def test_score_is_the_gradient_of_the_conditional_log_density() -> None:
    path = PATHS["cosine"]
    t = _times(path)
    data, noise = _pair(len(t))
    x = path.noised(data, noise, t).requires_grad_()
    point = path.at(t, data)
    density = torch.distributions.Normal(point.alpha * data, point.sigma).log_prob(x).sum()
    (expected,) = torch.autograd.grad(density, x)
    velocity = path.velocity(data, noise, t)
    score = path.convert(velocity, x.detach(), t, Quantity.VELOCITY, Quantity.SCORE)
    torch.testing.assert_close(score, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "source", "target"), list(product(PATHS, Quantity, Quantity)))
def test_conversions_stay_finite_at_both_ends(name: str, source: Quantity, target: Quantity) -> None:
    t = torch.tensor([0.0, 1.0])
    value, x = torch.randn(2, 2, 3, 4, 4)
    assert PATHS[name].convert(value, x, t, source, target).isfinite().all()


@pytest.mark.parametrize("name", PATHS)
def test_velocity_gives_data_and_noise_at_both_ends(name: str) -> None:
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    data, noise = _pair(2)
    x, velocity = PATHS[name].noised(data, noise, t), PATHS[name].velocity(data, noise, t)
    for target, expected in ((Quantity.DATA, data), (Quantity.NOISE, noise)):
        converted = PATHS[name].convert(velocity, x, t, Quantity.VELOCITY, target)
        torch.testing.assert_close(converted, expected, rtol=1e-8, atol=1e-8)


def test_linear_velocity_is_noise_minus_data() -> None:
    data, noise = _pair(5)
    velocity = PATHS["linear"].velocity(data, noise, torch.rand(5, dtype=torch.float64))
    torch.testing.assert_close(velocity, noise - data)


def test_a_scalar_time_serves_the_whole_batch() -> None:
    data, noise = _pair(5)
    path = PATHS["cosine"]
    scalar = path.noised(data, noise, torch.tensor(0.3, dtype=torch.float64))
    torch.testing.assert_close(scalar, path.noised(data, noise, torch.full((5,), 0.3, dtype=torch.float64)))


def test_half_precision_data_is_noised_in_the_precision_of_the_time() -> None:
    data = torch.randn(4, 3, 2, 2, dtype=torch.bfloat16)
    noise = torch.randn(4, 3, 2, 2)
    assert PATHS["linear"].noised(data, noise, torch.rand(4)).dtype == torch.float32
    steps = torch.tensor([999, 998, 1, 0])
    exact = DiscretePath().noised(data.double(), noise.double(), steps)
    low = DiscretePath().noised(data, noise, steps)
    torch.testing.assert_close(low.double(), exact, rtol=1e-5, atol=1e-5)


def test_an_unknown_path_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'cosine'"):
        get_path("cosin")


def test_discrete_process_is_diffusers_linear_schedule() -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    path = DiscretePath()
    torch.testing.assert_close(path.tables.betas.float(), scheduler.betas, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(path.tables.alpha_bars.float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)
    steps = torch.tensor([0, 1, 17, 500, 999])
    data, noise = torch.randn(2, 5, 3, 4, 4)
    theirs = scheduler.add_noise(data, noise, steps)
    torch.testing.assert_close(path.noised(data, noise, steps), theirs, rtol=1e-4, atol=1e-4)


def test_discrete_posterior_is_that_of_bayes() -> None:
    """q(x_{t-1} | x_t, x_0) by multiplying the two Gaussians' precisions."""
    tables = DiscretePath().tables
    for t in (1, 2, 100, 999):
        beta, previous = tables.betas[t], tables.alpha_bars[t - 1]
        precision = (1 - beta) / beta + 1 / (1 - previous)
        assert math.isclose(float(tables.posterior_variances[t]), float(1 / precision), rel_tol=1e-10)
    assert float(tables.posterior_variances[0]) == 0.0
