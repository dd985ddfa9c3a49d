"""The perceptual reward: how well a small probe reads what the eye notices in a patch out of the
representation.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrpo.alignment.gate import RunningMeans
from vrpo.alignment.policy import Actions
from vrpo.alignment.rewards import Reward, RewardContext, register_reward

HIDDEN = 64
_FREQUENCIES = 4


@register_reward("perceptual")
class Perceptual(Reward):
    """``-|psi(a, t) - f(z0)_n|^2`` with ``f`` the standardised descriptors of the clean patch.

    ``psi`` has one hidden layer and knows the time, since less of a patch can be read at more noise. It
    learns from the policy's mean without sending a gradient there. ``f`` is taken from the images where the
    batch has them, from the clean latents else.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        from vrpo.vision.perceptual import DESCRIPTORS

        # Unit vectors of C channels have entries of size 1/sqrt(C): scaled up, default initialisation fits
        # them.
        self.scale = math.sqrt(width)
        self.hidden = nn.Linear(width, HIDDEN)
        self.time = nn.Linear(2 * _FREQUENCIES, HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, len(DESCRIPTORS))
        self.seen = RunningMeans([*DESCRIPTORS, *(f"{name}^2" for name in DESCRIPTORS)], bins=1)

    def score(self, actions: Actions, context: RewardContext) -> Tensor:
        """Return minus the squared error of the probe's reading of every action."""
        before = actions.project(self.scale * self.hidden.weight) + self._bias(context).unsqueeze(2)
        read = self.out(F.silu(before))
        return -(read - self._descriptors(context).unsqueeze(2)).square().sum(-1)

    def preference(self, context: RewardContext) -> Tensor:
        """Return the gradient at the mean, ``-2 W1' (silu'(z) * W2' (psi - f))``."""
        before = self._before(context)
        error = self.out(F.silu(before)) - self._descriptors(context)
        through = torch.ops.aten.silu_backward(error @ self.out.weight, before)
        return -2 * self.scale * (through @ self.hidden.weight)

    def loss(self, context: RewardContext) -> Tensor:
        """Return the probe's mean squared error over tokens and descriptors."""
        descriptors = self._descriptors(context)
        self._observe(context)
        return F.mse_loss(self.out(F.silu(self._before(context))), descriptors)

    def update(self) -> None:
        """Advance the statistics that standardise the descriptors."""
        self.seen.update()

    def _before(self, context: RewardContext) -> Tensor:
        return F.linear(self.scale * context.mean, self.hidden.weight) + self._bias(context)

    def _bias(self, context: RewardContext) -> Tensor:
        """Return what the hidden layer adds at each image's time, (B, 1, H)."""
        angles = (
            context.batch.time.unsqueeze(-1)
            * math.pi
            * torch.arange(1, _FREQUENCIES + 1, device=context.mean.device, dtype=context.mean.dtype)
        )
        return (self.hidden.bias + self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))).unsqueeze(1)

    def _raw(self, context: RewardContext) -> Tensor:
        from vrpo.vision.perceptual import patch_descriptors

        batch = context.batch
        source = batch.clean if batch.images is None else batch.images
        return context.once("perceptual.raw", lambda: patch_descriptors(source, context.target.shape[1]))

    def _descriptors(self, context: RewardContext) -> Tensor:
        """Return ``f`` (B, N, 6), standardised by the patches of earlier steps; zero while there are none."""
        kinds = len(self.seen.names) // 2
        mean, square = (self.seen.total / self.seen.count.clamp_min(1e-6))[:, 0].split(kinds)
        deviation = (square - mean.square()).clamp_min(1e-6 * square).sqrt()
        scale = torch.where(deviation > 0, 1 / deviation, 0.0)
        return context.once("perceptual.f", lambda: (self._raw(context) - mean) * scale)

    def _observe(self, context: RewardContext) -> None:
        raw = self._raw(context)
        count = raw.shape[-1]
        rows = {name: raw[..., i] for i, name in enumerate(self.seen.names[:count])}
        rows |= {name: raw[..., i].square() for i, name in enumerate(self.seen.names[count:])}
        self.seen.observe(rows, torch.zeros(len(raw), dtype=torch.long, device=raw.device))
