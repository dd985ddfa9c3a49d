"""What the eye notices: descriptors of patches, and differentiable distances between images."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import isqrt, sqrt
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrpo.vision.weight_files import fit_weights, read_weights

DESCRIPTORS = ("contrast", "horizontal", "falling", "vertical", "rising", "laplacian")
"""What ``patch_descriptors`` returns, in order; the four in the middle are directions of change."""

_STEPS = ((0, 1), (1, 1), (1, 0), (-1, 1))


def patch_descriptors(images: Tensor, tokens: int) -> Tensor:
    """Return six amplitudes of each patch of images or latents (B, C, H, W), as float32 (B, tokens, 6).

    The patches are the cells of a square grid of ``tokens``. In order: the standard deviation within the
    patch (local contrast), the root mean square of the central difference along four directions (rightwards,
    right-downwards, downwards, right-upwards; per pixel of distance), and that of the 5-point Laplacian.
    Variances and squares are averaged over channels; beyond the edge the image is repeated.
    """
    side = isqrt(tokens)
    x = images.float()
    height, width = x.shape[-2:]
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")

    def shifted(down: int, right: int) -> Tensor:
        return padded[..., 1 + down : 1 + down + height, 1 + right : 1 + right + width]

    def patch_mean(values: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(values, side)

    # Variance about the image's mean first, so that a large offset does not cancel in float32.
    centred = x - x.mean((2, 3), keepdim=True)
    energies = [patch_mean(centred.square()) - patch_mean(centred).square()]
    for down, right in _STEPS:
        distance = 2 * sqrt(down * down + right * right)
        energies.append(patch_mean(((shifted(down, right) - shifted(-down, -right)) / distance).square()))
    laplacian = shifted(0, 1) + shifted(0, -1) + shifted(1, 0) + shifted(-1, 0) - 4 * x
    energies.append(patch_mean(laplacian.square()))
    return torch.stack(energies, -1).mean(1).flatten(1, 2).clamp_min(0).sqrt()


class PatchDescriptor(nn.Module):
    """Patch descriptors standardised by the mean and deviation of all patches observed so far.

    The running statistics are buffers, so they are saved with the module; before any are observed the
    descriptors are returned as they are.
    """

    width = len(DESCRIPTORS)
    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(self.width))
        self.register_buffer("squares", torch.zeros(self.width))

    @torch.no_grad()
    def forward(self, images: Tensor, observe: bool = False) -> Tensor:
        """Return standardised descriptors (B, N, 6) of (B, C, H, W), after counting them in if asked to."""
        described = patch_descriptors(images, self.tokens)
        if observe:
            self._observe(described.flatten(0, 1))
        deviation = (self.squares / self.count.clamp_min(1)).sqrt()
        deviation = torch.where(self.count > 0, deviation.clamp_min(1e-6), torch.ones_like(deviation))
        return (described - self.mean) / deviation

    def _observe(self, rows: Tensor) -> None:
        # Chan's update of mean and summed squared deviations: no cancellation, whatever the count.
        mean = rows.mean(0)
        total = self.count + len(rows)
        shift = mean - self.mean
        self.squares += (rows - mean).square().sum(0) + shift.square() * self.count * len(rows) / total
        self.mean += shift * len(rows) / total
        self.count += len(rows)


class EncoderDistance(nn.Module):
    """One minus the mean cosine between an encoder's tokens of two images.

    ``features`` maps images (B, 3, H, W) in [-1, 1] to tokens (B, N, C), differentiably. It is not registered
    as a submodule: a frozen encoder belongs to its owner.
    """

    def __init__(self, features: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._features = (features,)

    def forward(self, predicted: Tensor, images: Tensor) -> Tensor:
        """Return the distance (B,) of ``predicted`` to ``images``, differentiable in ``predicted`` only."""
        (features,) = self._features
        with torch.no_grad():
            wanted = F.normalize(features(images).float(), dim=-1, eps=1e-6)
        return 1 - (F.normalize(features(predicted).float(), dim=-1, eps=1e-6) * wanted).sum(-1).mean(-1)


_LPIPS_LAYERS = {
    "alex": ((2, 64), (5, 192), (8, 384), (10, 256), (12, 256)),
    "vgg": ((4, 64), (9, 128), (16, 256), (23, 512), (30, 512)),
}


class Lpips(nn.Module):
    """LPIPS (arXiv 1801.03924) from local files: torchvision's AlexNet or VGG-16, and its linear weights.

    ``backbone`` holds torchvision's keys (``features.0.weight``...; a classifier is ignored) and ``linear``
    those of the ``lpips`` package (``lin0.model.1.weight``...). Raises CheckpointError for files that are
    missing or of another network.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: str | Path, linear: str | Path, network: Literal["alex", "vgg"] = "vgg") -> None:
        super().__init__()
        from torchvision.models import alexnet, vgg16

        backbone, linear = Path(backbone), Path(linear)
        layers = _LPIPS_LAYERS[network]
        features: nn.Sequential = (alexnet if network == "alex" else vgg16)(weights=None).features
        name = {"alex": "torchvision's AlexNet", "vgg": "torchvision's VGG-16"}[network]
        fit_weights(
            nn.ModuleDict({"features": features}),
            read_weights(backbone),
            architecture=name,
            source=backbone,
            may_be_extra=("classifier",),
        )
        ends = (0, *(end for end, _ in layers))
        self.stages = nn.ModuleList(features[start:end] for start, end in pairwise(ends))
        self.heads = nn.ModuleList(nn.Conv2d(channels, 1, 1, bias=False) for _, channels in layers)
        # LPIPS' own checkpoints count a dropout, which has no weights, before each linear layer.
        wrapped = {
            f"lin{index}": nn.ModuleDict({"model": nn.Sequential(nn.Identity(), head)})
            for index, head in enumerate(self.heads)
        }
        fit_weights(nn.ModuleDict(wrapped), read_weights(linear), architecture=f"LPIPS on {name}", source=linear)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def forward(self, predicted: Tensor, images: Tensor) -> Tensor:
        """Return the distance (B,) between images (B, 3, H, W) in [-1, 1], in float32."""
        with torch.autocast(images.device.type, enabled=False):
            x, y = ((each.float() - self.shift) / self.scale for each in (predicted, images))
            distance = x.new_zeros(x.shape[0])
            for stage, head in zip(self.stages, self.heads, strict=True):
                x, y = stage(x), stage(y)
                distance = distance + head((_unit_channels(x) - _unit_channels(y)).square()).mean((1, 2, 3))
            return distance


def _unit_channels(x: Tensor) -> Tensor:
    # Clamped before the root: a location where no channel fires has no gradient instead of an infinite one.
    return x / x.square().sum(1, keepdim=True).clamp_min(1e-20).sqrt()
