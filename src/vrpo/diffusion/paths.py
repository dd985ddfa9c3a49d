"""Interpolation paths x_t = alpha(t) x0 + sigma(t) eps, with t = 0 at the data and t = 1 at the noise.

Every formula relating data, noise, velocity and score stands in `PathPoint`; a path supplies its
coefficients.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from vrpo.errors import ConfigError, nearest

# Smallest divisor in a conversion that is singular at one end of the path.
SMALLEST_DIVISOR = 1e-6


class Quantity(StrEnum):
    """What a network may predict about the noised input x_t."""

    VELOCITY = "velocity"
    NOISE = "noise"
    DATA = "data"
    SCORE = "score"


@dataclass(frozen=True)
class PathPoint:
    """Coefficients of a path at a time, and the linear maps that they define.

    With data z and noise e, x = alpha z + sigma e and v = d_alpha z + d_sigma e. The determinant
    alpha d_sigma - sigma d_alpha is positive at every time, so x and v determine z and e. Singular are only
    the data from the noise or the score where alpha = 0 (t = 1), and the noise from the data, and any score,
    where sigma = 0 (t = 0). There the divisor is held at `SMALLEST_DIVISOR`, so results stay finite.
    """

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    def noised(self, data: Tensor, noise: Tensor) -> Tensor:
        """Return x = alpha data + sigma noise."""
        return self.alpha * data + self.sigma * noise

    def velocity(self, data: Tensor, noise: Tensor) -> Tensor:
        """Return v = d_alpha data + d_sigma noise."""
        return self.d_alpha * data + self.d_sigma * noise

    def separate(self, value: Tensor, x: Tensor, source: Quantity) -> tuple[Tensor, Tensor]:
        """Return the (data, noise) whose noised input is ``x`` and whose ``source`` quantity is ``value``."""
        if source is Quantity.VELOCITY:
            determinant = self.alpha * self.d_sigma - self.sigma * self.d_alpha
            data = (self.d_sigma * x - self.sigma * value) / determinant
            return data, (self.alpha * value - self.d_alpha * x) / determinant
        if source is Quantity.DATA:
            return value, (x - self.alpha * value) / self.sigma.clamp(min=SMALLEST_DIVISOR)
        noise = value if source is Quantity.NOISE else -self.sigma * value
        return (x - self.sigma * noise) / self.alpha.clamp(min=SMALLEST_DIVISOR), noise

    def convert(self, value: Tensor, x: Tensor, source: Quantity, target: Quantity) -> Tensor:
        """Return the ``target`` quantity at the input ``x`` where the ``source`` quantity is ``value``."""
        if source is target:
            return value
        data, noise = self.separate(value, x, source)
        if target is Quantity.DATA:
            return data
        if target is Quantity.NOISE:
            return noise
        if target is Quantity.VELOCITY:
            return self.velocity(data, noise)
        return -noise / self.sigma.clamp(min=SMALLEST_DIVISOR)


class Path(ABC):
    """A family of conditional Gaussians N(alpha(t) x0, sigma(t)^2 I) leading from the data to the noise."""

    @abstractmethod
    def point(self, t: Tensor) -> PathPoint:
        """Return the coefficients at times ``t``, each of the shape of ``t``."""

    def at(self, t: Tensor, like: Tensor) -> PathPoint:
        """Return the coefficients at times ``t`` (B,) or (), shaped to multiply ``like`` (B, ...)."""
        dtype = torch.promote_types(t.dtype, like.dtype)
        return self.point(t.to(dtype).reshape(-1, *[1] * (like.ndim - 1)))

    def noised(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t = alpha data + sigma noise for ``data``, ``noise`` (B, ...) and ``t`` (B,)."""
        return self.at(t, data).noised(data, noise)

    def velocity(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the velocity target d_alpha data + d_sigma noise (SiT, arXiv 2401.08740)."""
        return self.at(t, data).velocity(data, noise)

    def convert(self, value: Tensor, x: Tensor, t: Tensor, source: Quantity, target: Quantity) -> Tensor:
        """Convert ``value`` (B, ...) at the input ``x`` (B, ...) and times ``t`` (B,) between quantities.

        Conversions that are singular at one end are listed in `PathPoint`.
        """
        return self.at(t, x).convert(value, x, source, target)


class LinearPath(Path):
    """alpha = 1 - t, sigma = t (rectified flow; the velocity is eps - x0)."""

    def point(self, t: Tensor) -> PathPoint:
        one = torch.ones_like(t)
        return PathPoint(alpha=1 - t, sigma=t, d_alpha=-one, d_sigma=one)


class CosinePath(Path):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2) (SiT's generalised variance-preserving path)."""

    def point(self, t: Tensor) -> PathPoint:
        rate = math.pi / 2
        alpha, sigma = torch.cos(rate * t), torch.sin(rate * t)
        return PathPoint(alpha=alpha, sigma=sigma, d_alpha=-rate * sigma, d_sigma=rate * alpha)


def _variance_preserving(log_alpha: Tensor, d_log_alpha: Tensor) -> PathPoint:
    """Return the point of a path with alpha^2 + sigma^2 = 1 from log alpha and its derivative."""
    alpha = torch.exp(log_alpha)
    sigma = torch.sqrt(-torch.expm1(2 * log_alpha))
    return PathPoint(alpha, sigma, alpha * d_log_alpha, -(alpha**2) * d_log_alpha / sigma)


class VPPath(Path):
    """The variance-preserving path with d log alpha / dt = -(0.1 + 19.9 t) / 2 (arXiv 2011.13456, eq. 33).

    d_sigma grows like 1/sqrt(t) towards the data, so times below ``smallest_time`` (SiT's training limit) are
    taken as ``smallest_time``. At t = 1, alpha is 0.0066 and not 0.
    """

    beta_min = 0.1
    beta_max = 20.0
    smallest_time = 1e-5

    def point(self, t: Tensor) -> PathPoint:
        t = t.clamp(min=self.smallest_time)
        growth = self.beta_max - self.beta_min
        log_alpha = -0.25 * growth * t**2 - 0.5 * self.beta_min * t
        return _variance_preserving(log_alpha, -0.5 * (self.beta_min + growth * t))


@dataclass(frozen=True)
class StepTables:
    """Constants of the discrete process, float64, one entry a step.

    ``betas``; ``alpha_bars``, the running products of 1 - beta; ``posterior_variances``, the variance of
    q(x_{t-1} | x_t, x_0), which is 0 at step 0; ``log_alphas`` and ``d_log_alphas`` of the path.
    """

    betas: Tensor
    alpha_bars: Tensor
    posterior_variances: Tensor
    log_alphas: Tensor
    d_log_alphas: Tensor


class DiscretePath(Path):
    """DiT's forward process: 1000 steps with beta from 1e-4 to 0.02 (DDPM, arXiv 2006.11239, section 4).

    Times are step numbers 0 to 999, whole numbers of any dtype; derivatives are per step, of log alpha
    interpolated linearly between steps.
    """

    steps = 1000

    def __init__(self) -> None:
        betas = torch.linspace(1e-4, 0.02, self.steps, dtype=torch.float64)
        alpha_bars = torch.cumprod(1 - betas, dim=0)
        previous = torch.cat([alpha_bars.new_ones(1), alpha_bars[:-1]])
        d_log_alphas = 0.5 * torch.log1p(-betas)
        self.tables = StepTables(
            betas=betas,
            alpha_bars=alpha_bars,
            posterior_variances=betas * (1 - previous) / (1 - alpha_bars),
            log_alphas=torch.cumsum(d_log_alphas, dim=0),
            d_log_alphas=d_log_alphas,
        )
        self._copies: dict[torch.device, StepTables] = {}

    def tables_on(self, device: torch.device) -> StepTables:
        """Return the tables on ``device``, copied there once."""
        if device not in self._copies:
            self._copies[device] = StepTables(**{k: v.to(device) for k, v in vars(self.tables).items()})
        return self._copies[device]

    def point(self, t: Tensor) -> PathPoint:
        tables, steps = self.tables_on(t.device), t.long()
        return _variance_preserving(tables.log_alphas[steps], tables.d_log_alphas[steps])

    def at(self, t: Tensor, like: Tensor) -> PathPoint:
        point = self.point(t.reshape(-1, *[1] * (like.ndim - 1)))
        dtype = torch.promote_types(like.dtype, torch.float32)
        return PathPoint(**{name: value.to(dtype) for name, value in vars(point).items()})


_PATHS: dict[str, type[Path]] = {
    "linear": LinearPath,
    "cosine": CosinePath,
    "vp": VPPath,
}
PATH_NAMES = tuple(_PATHS)


def get_path(name: str) -> Path:
    """Return the continuous path called ``name``: linear, cosine or vp.

    Raises ConfigError for an unknown name.
    """
    if name not in _PATHS:
        raise ConfigError(f"there is no path called '{name}': {nearest(name, PATH_NAMES)}")
    return _PATHS[name]()
