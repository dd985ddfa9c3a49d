"""Denoising losses of SiT (flow matching) and DiT (noise prediction with learned variance), and their times.

Times are pure functions of uniform numbers that the caller draws, so that a resumed run repeats them.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from vrpo.diffusion.paths import DiscretePath, Path, Quantity
from vrpo.errors import ConfigError, nearest

TimeDistribution = Literal["uniform", "logit-normal"]


def stratify(uniforms: Tensor, noisings: int) -> Tensor:
    """Spread each image's ``noisings`` uniform numbers over equal parts of [0, 1), one number a part.

    ``uniforms`` (images * noisings,) holds an image's numbers next to each other; so does the result.
    """
    numbers = uniforms.reshape(-1, noisings)
    parts = torch.arange(noisings, device=uniforms.device, dtype=uniforms.dtype)
    return ((parts + numbers) / noisings).reshape(-1)


def mean_square(difference: Tensor) -> Tensor:
    """Return the mean square (B,) of ``difference`` (B, ...) over all but the batch dimension."""
    return difference.square().flatten(1).mean(dim=1)


class Denoising(Protocol):
    """What a network learns to denoise, and how its output is read.

    Times ``t`` (B,) are what the network is given: [0, 1] for flow matching, step numbers for DiT.
    """

    def times(self, uniforms: Tensor) -> Tensor:
        """Return times (B,) float32 for uniform numbers in [0, 1), larger for larger numbers."""

    def unit_time(self, t: Tensor) -> Tensor:
        """Return the times on the scale where 0 is data and 1 is noise."""

    def noised(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the network's input x_t (B, C, H, W)."""

    def loss(self, output: Tensor, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the denoising loss of each sample (B,) from the network's ``output`` at x_t."""

    def predict_data(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the one-step prediction of x_0 (B, C, H, W) from the network's ``output`` at ``x``."""


class FlowMatching:
    """Velocity prediction on a continuous path (SiT, arXiv 2401.08740)."""

    def __init__(
        self,
        path: Path,
        time_distribution: TimeDistribution = "uniform",
        time_mean: float = 0.0,
        time_std: float = 1.0,
    ) -> None:
        """Take a path and the distribution of training times.

        ``logit-normal`` times are sigmoid(n) with n Gaussian of ``time_mean`` and ``time_std`` (arXiv
        2403.03206); positive means train more on noise. Raises ConfigError for an unknown distribution.
        """
        choices = get_args(TimeDistribution)
        if time_distribution not in choices:
            raise ConfigError(
                f"there is no time distribution '{time_distribution}': {nearest(time_distribution, choices)}"
            )
        self.path = path
        self._distribution, self._mean, self._std = time_distribution, time_mean, time_std

    def times(self, uniforms: Tensor) -> Tensor:
        if self._distribution == "uniform":
            return uniforms.float()
        # The quantile function in float64: in float32 the tail beyond 5 standard deviations is flat.
        return torch.sigmoid(self._mean + self._std * torch.special.ndtri(uniforms.double())).float()

    def unit_time(self, t: Tensor) -> Tensor:
        return t

    def noised(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.path.noised(data, noise, t)

    def loss(self, output: Tensor, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return mean_square(output - self.path.velocity(data, noise, t))

    def predict_data(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.path.convert(output, x, t, Quantity.VELOCITY, Quantity.DATA)


class NoisePrediction:
    """Noise prediction with a learned variance: squared error plus variational bound (DiT, arXiv 2212.09748).

    The network predicts 2 C channels: the noise, and where the log-variance lies (-1 to 1) between its two
    bounds. The bound is in bits per dimension and enters with weight 1, as in the published training code.
    """

    def __init__(self) -> None:
        self.path = DiscretePath()

    def times(self, uniforms: Tensor) -> Tensor:
        last = self.path.steps - 1
        return (uniforms.float() * self.path.steps).floor().clamp(max=last)

    def unit_time(self, t: Tensor) -> Tensor:
        return t / (self.path.steps - 1)

    def noised(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.path.noised(data, noise, t)

    def loss(self, output: Tensor, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        prediction, range_position = output.chunk(2, dim=1)
        bound = variational_bound(self.path, prediction.detach(), range_position, data, noise, t)
        return mean_square(prediction - noise) + bound

    def predict_data(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.path.convert(output.chunk(2, dim=1)[0], x, t, Quantity.NOISE, Quantity.DATA)


def variational_bound(
    path: DiscretePath, prediction: Tensor, range_position: Tensor, data: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """Return the bound of each sample (B,) at its step, in bits per dimension (arXiv 2102.09672).

    For steps t > 0 it is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)). At step 0 it is the negative
    log-likelihood of ``data`` under p, a Gaussian on the 256 levels of [-1, 1], as DiT computes it also for
    latents. ``prediction`` of the ``noise``, ``range_position`` of the log-variance, ``data`` and ``noise``
    are (B, C, H, W), ``t`` (B,) steps.
    """
    tables = path.tables_on(data.device)
    steps = t.long().reshape(-1, *[1] * (data.ndim - 1))
    dtype = torch.promote_types(data.dtype, torch.float32)
    beta, posterior = tables.betas[steps], tables.posterior_variances[steps.clamp(min=1)]
    largest, smallest = beta.log().to(dtype), posterior.log().to(dtype)
    fraction = (range_position.to(dtype) + 1) / 2
    log_variance = fraction * largest + (1 - fraction) * smallest

    # The means of p and q are one function of the predicted and the true x_0, so they differ by a multiple of
    # the error of the noise.
    scale = beta / ((1 - beta) * (1 - tables.alpha_bars[steps])).sqrt()
    mean_error = scale.to(dtype) * (prediction - noise)

    ratio = smallest - log_variance
    divergence = 0.5 * (ratio.exp() - ratio - 1 + mean_error.square() * torch.exp(-log_variance))
    surprise = _negative_log_likelihood(data, data - mean_error, log_variance)
    return torch.where(steps == 0, surprise, divergence).flatten(1).mean(dim=1) / math.log(2)


def _negative_log_likelihood(data: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return -log of a Gaussian's mass in the bin of ``data``, 2/255 wide and open at -1 and 1; in nats."""
    inverse_std, half_bin = torch.exp(-0.5 * log_variance), 1 / 255
    error = data - mean
    # Both edges are mirrored below the mean, where the distribution function keeps its relative precision.
    distance = error.abs()
    inner = torch.special.ndtr(inverse_std * (half_bin - distance))
    inner = inner - torch.special.ndtr(-inverse_std * (half_bin + distance))
    lowest = torch.special.ndtr(inverse_std * (half_bin + error))
    highest = torch.special.ndtr(inverse_std * (half_bin - error))
    mass = torch.where(data < -0.999, lowest, torch.where(data > 0.999, highest, inner))
    return -torch.log(mass.clamp(min=1e-12))
