"""From the trunk's tokens to the encoder's feature space: projectors, and the unit sphere of the comparison.

Precision: matrix products follow the ambient autocast where that is bfloat16, whose range is float32's. Under
float16 autocast projectors run in float32 all the same, because a product that overflows normalises to NaN.
Outputs, norms and everything after are float32 (float64 for float64 projectors).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Return ``x`` scaled to unit length along its last dimension, in float32 or wider.

    Vectors shorter than ``eps`` are divided by ``eps``, so that zero stays zero and gradients stay finite.
    """
    x = _widened(x)
    return x / x.square().sum(-1, keepdim=True).clamp_min(eps * eps).sqrt()


class MLPProjector(nn.Module):
    """Linear-SiLU-Linear-SiLU-Linear on each token, (B, N, in_width) -> (B, N, out_width) (arXiv 2410.06940).

    Weights start Xavier-uniform and biases at zero: in REPA's code the trunk's initialisation reaches them.
    """

    def __init__(self, in_width: int, out_width: int, width: int = 2048) -> None:
        super().__init__()
        self.first = nn.Linear(in_width, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, out_width)
        for layer in (self.first, self.second, self.last):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, h: Tensor) -> Tensor:
        """Return the projected tokens in float32 (or the weights' wider type)."""
        with _wide_range(h):
            h = _like_weight(h, self.first.weight)
            return _widened(self.last(F.silu(self.second(F.silu(self.first(h))))))


class ConvProjector(nn.Module):
    """One 3x3 convolution over the square grid of tokens, (B, N, in_width) -> (B, N, out_width).

    Source: iREPA, arXiv 2512.10794; its code pads with zeros and keeps torch's own initialisation.
    """

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_width, out_width, kernel_size=3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        """Return the projected tokens in float32 (or the weights' wider type)."""
        return self._convolve(h, self.conv.bias)

    def push(self, tangent: Tensor) -> Tensor:
        """Return the derivative along ``tangent``, which is the same at every ``h``: the map is affine."""
        return self._convolve(tangent, None)

    def _convolve(self, tokens: Tensor, bias: Tensor | None) -> Tensor:
        side = isqrt(tokens.shape[1])
        with _wide_range(tokens):
            grid = _like_weight(tokens, self.conv.weight).transpose(1, 2).unflatten(2, (side, side))
            return _widened(F.conv2d(grid, self.conv.weight, bias, padding=1).flatten(2).transpose(1, 2))


def projector_of(tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return the projector whose state dict is ``tensors``."""
    projector: nn.Module
    if "conv.weight" in tensors:
        out_width, in_width = tensors["conv.weight"].shape[:2]
        projector = ConvProjector(in_width, out_width)
    else:
        (width, in_width), out_width = tensors["first.weight"].shape, len(tensors["last.bias"])
        projector = MLPProjector(in_width, out_width, width)
    projector.load_state_dict(dict(tensors))
    return projector


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _like_weight(x: Tensor, weight: Tensor) -> Tensor:
    return x.to(weight.dtype)


def _wide_range(x: Tensor) -> AbstractContextManager[object]:
    device = x.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
        return torch.autocast(device, enabled=False)
    return nullcontext()
