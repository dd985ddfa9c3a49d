"""The exponential moving average of the trunk's weights, which samples are drawn from."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from vrpo.models.transformer import DiffusionTransformer


class Ema:
    """Averaged copy of a network, with a warm-up of the decay.

    After update n (counted from 0) the decay is ``min(decay, (1 + n) / (10 + n))``, so that early averages forget the
    initial weights.
    """

    def __init__(self, network: DiffusionTransformer, decay: float) -> None:
        self.decay = decay
        self.network: DiffusionTransformer = copy.deepcopy(network).eval()
        self.network.requires_grad_(False)

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move the average towards ``network`` after optimiser step ``step`` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averaged: list[Tensor] = list(self.network.parameters())
        values: list[Tensor] = list(network.parameters())
        torch._foreach_lerp_(averaged, values, 1 - decay)
        for mean, value in zip(self.network.buffers(), network.buffers(), strict=True):
            mean.copy_(value)
