"""Samplers on Gaussian data, whose velocity, flow and noise prediction are known in closed form.

For data N(mu, S) the path's marginal is N(alpha mu, alpha^2 S + sigma^2 I). All maps are affine, so a
sampler's mean and covariance are computed exactly, by giving it unit vectors in place of noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from vrpo.diffusion.noise import SampleNoise
from vrpo.diffusion.paths import Path, Quantity, get_path
from vrpo.diffusion.samplers import FLOW_SAMPLERS, sample, sample_dit
from vrpo.errors import ConfigError

MEAN = torch.tensor([0.7, -1.2], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.5, 0.3], [0.3, 0.8]], dtype=torch.float64)


def _posterior_noise(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """E[noise | x] = sigma C^-1 (x - alpha mu), with C = alpha^2 S + sigma^2 I, for ``x`` (B, 2)."""
    marginal = alpha**2 * COVARIANCE + sigma**2 * torch.eye(2, dtype=torch.float64)
    return sigma * torch.linalg.solve(marginal, (x - alpha * MEAN).T).T


def _posterior_data(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    marginal = alpha**2 * COVARIANCE + sigma**2 * torch.eye(2, dtype=torch.float64)
    return MEAN + alpha * torch.linalg.solve(marginal, (x - alpha * MEAN).T).T @ COVARIANCE


@dataclass
class GaussianNetwork:
    """The exact velocity of the Gaussian data, and a record of its calls."""

    path: Path
    calls: list[tuple[int, float]] = field(default_factory=list)

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        assert t.shape == (len(x),)
        self.calls.append((len(x), float(t[0])))
        point = self.path.point(t[0].double())
        state = x.double().flatten(1)
        data = _posterior_data(state, point.alpha, point.sigma)
        noise = _posterior_noise(state, point.alpha, point.sigma)
        return point.velocity(data, noise).reshape(x.shape).to(x.dtype)


def _exact_flow(path: Path, start: Tensor) -> Tensor:
    """The probability flow from t = 1 to 0: x_0 = mu + S^1/2 C_1^-1/2 (x_1 - alpha_1 mu)."""
    point = path.point(torch.ones((), dtype=torch.float64))
    values, vectors = torch.linalg.eigh(COVARIANCE)
    gain = (values / (point.alpha**2 * values + point.sigma**2)).sqrt()
    moved = (start.flatten(1) - point.alpha * MEAN) @ vectors
    return (MEAN + (moved * gain) @ vectors.T).reshape(start.shape)


def _start(count: int) -> Tensor:
    return torch.randn(count, 2, 1, 1, dtype=torch.float64)


@pytest.mark.parametrize("name", ["linear", "cosine", "vp"])
@pytest.mark.parametrize(("sampler", "order"), [("ode-euler", 1), ("ode-heun", 2)])
def test_ode_converges_to_the_exact_flow_with_its_order(name: str, sampler: str, order: int) -> None:
    path, start = get_path(name), _start(16)
    exact = _exact_flow(path, start)

    def error(steps: int) -> float:
        result = sample(GaussianNetwork(path), start, None, path=path, sampler=sampler, steps=steps)
        return float((result - exact).abs().max())

    errors = [error(steps) for steps in (80, 160, 320)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)
    assert errors[-1] < (3e-2 if order == 1 else 3e-3)


@dataclass
class UnitNoise:
    """Step noise that is a unit vector for one member of the batch: it reads off a sampler's linear map."""

    members: int
    count: int = 0

    @property
    def generators(self) -> list[torch.Generator]:
        raise NotImplementedError

    def step(self) -> Tensor:
        noise = torch.zeros(self.members, 2, 1, 1, dtype=torch.float64)
        for axis in range(2):
            noise[1 + 2 * (self.count + 1) + axis, axis] = 1
        self.count += 1
        return noise


def _moments(sampler: str, path: Path, steps: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the sampler's result, exactly, for unit Gaussian initial and step noise."""
    members = 1 + 2 * (steps if sampler == "sde" else 1)
    start = torch.zeros(members, 2, 1, 1, dtype=torch.float64)
    start[1, 0] = start[2, 1] = 1
    source = UnitNoise(members)
    result = sample(
        GaussianNetwork(path), start, None, path=path, sampler=sampler, steps=steps, noise_source=source
    ).flatten(1)
    assert source.count == (steps - 1 if sampler == "sde" else 0)
    jacobian = result[1:] - result[0]
    return result[0], jacobian.T @ jacobian


@pytest.mark.parametrize("name", ["linear", "cosine", "vp"])
@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_samplers_reach_the_mean_and_covariance_of_the_data(name: str, sampler: str) -> None:
    mean, covariance = _moments(sampler, get_path(name), steps=250)
    torch.testing.assert_close(mean, MEAN, rtol=0, atol=0.03)
    torch.testing.assert_close(covariance, COVARIANCE, rtol=0, atol=0.03)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_sde_converges_to_the_marginal_at_its_last_time_followed_by_one_plain_step(name: str) -> None:
    path = get_path(name)
    t = torch.tensor(0.04, dtype=torch.float64)
    point = path.point(t)

    def last_step(x: Tensor) -> Tensor:
        data, noise = (f(x, point.alpha, point.sigma) for f in (_posterior_data, _posterior_noise))
        # Drift v - w/2 score with w = 2t and score = -noise / sigma.
        return x - t * (point.velocity(data, noise) + t * noise / point.sigma)

    marginal = point.alpha**2 * COVARIANCE + point.sigma**2 * torch.eye(2, dtype=torch.float64)
    basis = torch.linalg.cholesky(marginal).T
    limit_mean = last_step((point.alpha * MEAN)[None])[0]
    jacobian = last_step(point.alpha * MEAN + basis) - limit_mean
    errors = []
    for steps in (100, 200):
        mean, covariance = _moments("sde", path, steps)
        difference = torch.cat([mean - limit_mean, (covariance - jacobian.T @ jacobian).flatten()])
        errors.append(float(difference.abs().max()))
    assert errors[1] < 0.01
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.3)


def test_sde_visits_the_stated_times_and_its_last_step_is_deterministic() -> None:
    path, network = get_path("linear"), GaussianNetwork(get_path("linear"))
    source = SampleNoise(0, [0], (2, 1, 1))
    reached: list[float] = []
    sample(
        network,
        source.initial(),
        None,
        path=path,
        sampler="sde",
        steps=25,
        noise_source=source,
        on_step=lambda step, t, state: reached.append(t),
    )
    expected = [1 - 0.04 * k for k in range(25)]
    assert [t for _, t in network.calls] == pytest.approx(expected, abs=1e-6)
    assert reached == pytest.approx([*expected[1:], 0.0], abs=1e-12)
    # 24 of the 25 steps drew noise: the next draw is the twenty-fifth.
    fresh = SampleNoise(0, [0], (2, 1, 1))
    for _ in range(24):
        fresh.step()
    assert torch.equal(source.step(), fresh.step())


def test_sde_step_is_the_published_formula() -> None:
    """One noisy step and the last one, written out from v - (w/2) s with w = 2t for an arbitrary velocity."""
    path, start = get_path("linear"), _start(3)

    def network(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return x**2 - t[:, None, None, None]

    source = SampleNoise(0, range(3), (2, 1, 1))
    result = sample(network, start, None, path=path, sampler="sde", steps=2, noise_source=source)

    draw = SampleNoise(0, range(3), (2, 1, 1)).step().double()
    x = start
    velocity = x**2 - 1.0
    x = x + (0.04 - 1.0) * (velocity - 1.0 * (-x)) + math.sqrt(2 * 0.96) * draw
    velocity = x**2 - 0.04
    score = -(x * 1.0 + 0.96 * velocity) / 0.04
    torch.testing.assert_close(result, x - 0.04 * (velocity - 0.04 * score))


@pytest.mark.parametrize(("sampler", "calls"), [("ode-euler", 6), ("ode-heun", 11), ("sde", 6)])
def test_without_guidance_only_the_conditional_model_is_evaluated(sampler: str, calls: int) -> None:
    path, network, labels = get_path("linear"), LabelNetwork(), torch.tensor([3, 1, 2])
    source = SampleNoise(0, range(3), (2, 1, 1))
    result = sample(
        network,
        source.initial(),
        labels,
        path=path,
        sampler=sampler,
        steps=6,
        guidance_scale=1.0,
        null_label=9,
        noise_source=source,
    )
    assert [len(seen) for seen in network.labels] == [3] * calls
    assert all(torch.equal(seen, labels) for seen in network.labels)
    again = SampleNoise(0, range(3), (2, 1, 1))
    plain = sample(
        lambda x, t, y: LabelNetwork()(x, t, labels),
        again.initial(),
        None,
        path=path,
        sampler=sampler,
        steps=6,
        noise_source=again,
    )
    assert torch.equal(result, plain)


@dataclass
class LabelNetwork:
    """A velocity that depends on the label and does not mix samples; it records its labels and times."""

    labels: list[Tensor] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        self.labels.append(labels)
        self.times.append(float(t[0]))
        return 0.3 * x - 0.2 * labels.to(x.dtype)[:, None, None, None] * t[:, None, None, None]


def test_guidance_extrapolates_from_the_null_label() -> None:
    path, network, start = get_path("linear"), LabelNetwork(), _start(3)
    labels = torch.tensor([3, 1, 2])
    result = sample(network, start, labels, path=path, sampler="ode-euler", steps=1, guidance_scale=4.0, null_label=9)
    conditional, null = (0.3 * start - 0.2 * y for y in (labels[:, None, None, None], 9))
    torch.testing.assert_close(result, start - (null + 4.0 * (conditional - null)))
    assert torch.equal(network.labels[0], torch.tensor([3, 1, 2, 9, 9, 9]))


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_guidance_of_some_channels_leaves_the_others_conditional(sampler: str) -> None:
    """The rule of DiT's and SiT's code; to the bit, since this velocity acts on each channel by itself."""

    def draw(scale: float, channels: int | None) -> Tensor:
        source = SampleNoise(0, range(2), (4, 1, 1))
        return sample(
            LabelNetwork(), source.initial(), torch.tensor([3, 1]), path=get_path("linear"), sampler=sampler, steps=8,
            guidance_scale=scale, guidance_channels=channels, null_label=5, noise_source=source,
        )  # fmt: skip

    some, every, none = draw(2.0, 3), draw(2.0, None), draw(1.0, None)
    assert torch.equal(some[:, :3], every[:, :3])
    assert torch.equal(some[:, 3:], none[:, 3:])
    assert not torch.equal(some[:, 3:], every[:, 3:])
    assert torch.equal(draw(2.0, 4), every)


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_guiding_the_velocity_is_guiding_the_drift(sampler: str) -> None:
    """Guidance of an affine-in-label velocity equals the unguided model of the extrapolated label."""
    path, start = get_path("cosine"), _start(2)
    common: dict[str, Any] = {"path": path, "sampler": sampler, "steps": 8}
    guided = sample(
        LabelNetwork(),
        start,
        torch.tensor([3, 1]),
        guidance_scale=2.0,
        null_label=5,
        noise_source=SampleNoise(0, range(2), (2, 1, 1)),
        **common,
    )
    extrapolated = torch.tensor([1, -3])
    plain = sample(
        LabelNetwork(),
        start,
        extrapolated,
        noise_source=SampleNoise(0, range(2), (2, 1, 1)),
        **common,
    )
    torch.testing.assert_close(guided, plain)


@pytest.mark.parametrize(
    ("sampler", "steps", "interval", "guided_times"),
    [
        ("ode-euler", 10, (0.3, 0.7), [0.7, 0.6, 0.5, 0.4, 0.3]),
        ("ode-euler", 10, (0.31, 0.69), [0.6, 0.5, 0.4]),
        ("ode-euler", 10, (0.0, 1.0), [k / 10 for k in range(10, 0, -1)]),
        ("ode-heun", 5, (0.2, 0.4), [0.4, 0.4, 0.2, 0.2]),
        ("sde", 25, (0.04, 0.12), [0.12, 0.08, 0.04]),
    ],
)
def test_guidance_interval_includes_its_ends_and_nothing_else(
    sampler: str, steps: int, interval: tuple[float, float], guided_times: list[float]
) -> None:
    network = LabelNetwork()
    source = SampleNoise(0, range(2), (2, 1, 1))
    sample(
        network,
        source.initial(),
        torch.tensor([0, 1]),
        path=get_path("linear"),
        sampler=sampler,
        steps=steps,
        guidance_scale=3.0,
        guidance_interval=interval,
        null_label=9,
        noise_source=source,
    )
    seen = [t for t, labels in zip(network.times, network.labels, strict=True) if len(labels) == 4]
    assert seen == pytest.approx(guided_times, abs=1e-6)
    # Inside, both halves in one batch; outside, the conditional one alone.
    assert {tuple(labels.tolist()) for labels in network.labels} <= {(0, 1), (0, 1, 9, 9)}


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_a_sample_is_the_same_whatever_the_batch(sampler: str) -> None:
    def draw(indices: list[int]) -> Tensor:
        source = SampleNoise(3, indices, (2, 4, 4))
        labels = torch.tensor(indices) % 3
        return sample(
            LabelNetwork(),
            source.initial(),
            labels,
            path=get_path("linear"),
            sampler=sampler,
            steps=5,
            guidance_scale=2.0,
            null_label=3,
            noise_source=source,
        )

    whole = draw([0, 1, 2, 3, 4])
    assert torch.equal(whole, torch.cat([draw([0, 1]), draw([2]), draw([3, 4])]))


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_the_state_is_float64_and_the_network_sees_the_dtype_of_the_noise(sampler: str) -> None:
    dtypes: list[torch.dtype] = []
    states: list[torch.dtype] = []

    def network(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        dtypes.extend((x.dtype, t.dtype))
        return x

    source = SampleNoise(0, range(2), (2, 1, 1))
    result = sample(
        network,
        source.initial(),
        None,
        path=get_path("linear"),
        sampler=sampler,
        steps=3,
        noise_source=source,
        on_step=lambda step, t, state: states.append(state.dtype),
    )
    assert set(dtypes) == {torch.float32}
    assert states == [torch.float64] * 3
    assert result.dtype == torch.float32


def test_wrong_requests_are_refused_with_a_sentence() -> None:
    path, start, labels = get_path("linear"), _start(1), torch.tensor([0])
    network = GaussianNetwork(path)

    def ask(**changes: object) -> None:
        arguments: dict[str, Any] = {"path": path, "sampler": "sde", "steps": 4, **changes}
        sample(network, start, labels, **arguments)

    def ask_dit(**changes: object) -> None:
        arguments: dict[str, Any] = {"sampler": "ddim", "steps": 4, **changes}
        sample_dit(network, start, labels, **arguments)

    for call, changes, sentence in (
        (ask, {"sampler": "ode-huen"}, "'ode-heun'"),
        (ask, {"sampler": "ddpm"}, "ode-euler"),
        (ask, {"steps": 0}, "1 or more"),
        (ask, {}, "noise_source"),
        (ask, {"guidance_scale": 2.0}, "needs classes"),
        (ask, {"guidance_interval": (0.7, 0.3)}, "0.7 0.3 ends before it starts: write 0.3 0.7"),
        (ask_dit, {"sampler": "sde"}, "ddim"),
        (ask_dit, {"sampler": "ddpm"}, "noise_source"),
        (ask_dit, {"steps": 240}, "^steps 240 does not divide the 1,000 steps of ddim: use 250"),
        (
            ask_dit,
            {"sampler": "ddpm", "steps": 1001, "noise_source": UnitNoise(1)},
            "more than the 1,000 steps of ddpm: use 1000",
        ),
    ):
        with pytest.raises(ConfigError, match=sentence):
            call(**changes)


def test_sde_drift_uses_the_score_of_the_velocity() -> None:
    """The score read from the Gaussian's velocity is the gradient of its log-density."""
    for name in ("linear", "cosine", "vp"):
        path = get_path(name)
        t = torch.tensor(0.4, dtype=torch.float64)
        point = path.point(t)
        x = _start(5)
        velocity = GaussianNetwork(path)(x, t.expand(5), None)
        score = path.convert(velocity, x, t, Quantity.VELOCITY, Quantity.SCORE).flatten(1)
        leaf = x.flatten(1).requires_grad_()
        marginal = point.alpha**2 * COVARIANCE + point.sigma**2 * torch.eye(2, dtype=torch.float64)
        density = torch.distributions.MultivariateNormal(point.alpha * MEAN, marginal).log_prob(leaf).sum()
        torch.testing.assert_close(score, torch.autograd.grad(density, leaf)[0], rtol=1e-8, atol=1e-8)
