"""What the eye notices: descriptors of patches, and differentiable distances between images."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import isqrt, sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrpo.errors import ConfigError, nearest
from vrpo.files import tensors_hash
from vrpo.vision.weight_files import fit_weights, read_weights

if TYPE_CHECKING:
    from vrpo.vision.encoders import Encoder

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


def token_features(encoder: Encoder) -> Callable[[Tensor], Tensor]:
    """Return a differentiable function from images (B, 3, H, W) in [-1, 1] to the encoder's own tokens (B, n*n, C).

    It sees images as ``Encoder.tokens`` does (resized, normalised, in the encoder's precision) and leaves the tokens
    on the encoder's own grid.
    """

    def features(images: Tensor) -> Tensor:
        with encoder._precision(images.device):
            return encoder.backbone.tokens(encoder._prepare((images + 1) * 127.5))

    return features


class EncoderDistance(nn.Module):
    """One minus the mean cosine between an encoder's tokens of two images.

    ``features`` maps images (B, 3, H, W) in [-1, 1] to tokens (B, N, C), differentiably. It is not registered
    as a submodule: a frozen encoder belongs to its owner. ``fingerprint`` is that of the encoder.
    """

    def __init__(self, features: Callable[[Tensor], Tensor], fingerprint: str = "") -> None:
        super().__init__()
        self._features, self.fingerprint = (features,), fingerprint

    def forward(self, predicted: Tensor, images: Tensor) -> Tensor:
        """Return the distance (B,) of ``predicted`` to ``images``, differentiable in ``predicted`` only."""
        (features,) = self._features
        with torch.no_grad():
            wanted = _unit_tokens(features(images))
        return 1 - (_unit_tokens(features(predicted)) * wanted).sum(-1).mean(-1)


def _unit_tokens(tokens: Tensor) -> Tensor:
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return F.normalize(tokens, dim=-1, eps=1e-6)


RANDOM = "random"
_LPIPS_LAYERS = {
    "alex": ((2, 64), (5, 192), (8, 384), (10, 256), (12, 256)),
    "vgg": ((4, 64), (9, 128), (16, 256), (23, 512), (30, 512)),
}
_LPIPS_SMALLEST = {"alex": 31, "vgg": 16}


class Lpips(nn.Module):
    """LPIPS (arXiv 1801.03924) from local files: torchvision's AlexNet or VGG-16, and its linear weights.

    ``backbone`` holds torchvision's keys (``features.0.weight``...; a classifier is ignored) and ``linear``
    those of the ``lpips`` package (``lin0.model.1.weight``...); or either is ``"random"``. Images are resized
    (bicubic) to ``input_size`` pixels a side, or taken as they are; below ``smallest`` pixels nothing is left of
    them. Raises ConfigError for a ``network`` other than alex and vgg, CheckpointError for files that are missing or
    of another network.
    """

    shift: Tensor
    scale: Tensor
    input_size: int | None
    smallest: int

    def __init__(
        self, backbone: str | Path, linear: str | Path, network: str = "vgg", input_size: int | None = None
    ) -> None:
        super().__init__()
        from torchvision.models import alexnet, vgg16

        if network not in _LPIPS_LAYERS:
            raise ConfigError(f"LPIPS has no network '{network}': {nearest(network, _LPIPS_LAYERS)}")
        self.network, self.input_size, self.smallest = network, input_size, _LPIPS_SMALLEST[network]
        layers = _LPIPS_LAYERS[network]
        features: nn.Sequential = (alexnet if network == "alex" else vgg16)(weights=None).features
        ends = (0, *(end for end, _ in layers))
        self.stages = nn.ModuleList(features[start:end] for start, end in pairwise(ends))
        self.heads = nn.ModuleList(nn.Conv2d(channels, 1, 1, bias=False) for _, channels in layers)
        # LPIPS' own checkpoints count a dropout, which has no weights, before each linear layer.
        wrapped = {
            f"lin{index}": nn.ModuleDict({"model": nn.Sequential(nn.Identity(), head)})
            for index, head in enumerate(self.heads)
        }
        name = {"alex": "torchvision's AlexNet", "vgg": "torchvision's VGG-16"}[network]
        for module, file, of, extra in (
            (nn.ModuleDict({"features": features}), backbone, name, ("classifier",)),
            (nn.ModuleDict(wrapped), linear, f"LPIPS on {name}", ()),
        ):
            if file != RANDOM:
                source = Path(file)
                fit_weights(module, read_weights(source), architecture=of, source=source, may_be_extra=extra)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    @property
    def fingerprint(self) -> str:
        """Text that changes whenever the distances do: network, weights, input size."""
        return f"lpips-{self.network} weights={tensors_hash(self.state_dict())} input={self.input_size}"

    def forward(self, predicted: Tensor, images: Tensor) -> Tensor:
        """Return the distance (B,) between images (B, 3, H, W) in [-1, 1], in float32."""
        with torch.autocast(images.device.type, enabled=False):
            x, y = ((self._resized(each.float()) - self.shift) / self.scale for each in (predicted, images))
            distance = x.new_zeros(x.shape[0])
            for stage, head in zip(self.stages, self.heads, strict=True):
                x, y = stage(x), stage(y)
                distance = distance + head((_unit_channels(x) - _unit_channels(y)).square()).mean((1, 2, 3))
            return distance

    def _resized(self, images: Tensor) -> Tensor:
        side = self.input_size
        if side is None or images.shape[-2:] == (side, side):
            return images
        return F.interpolate(images, size=(side, side), mode="bicubic", antialias=True)


def _unit_channels(x: Tensor) -> Tensor:
    # Clamped before the root: a location where no channel fires has no gradient instead of an infinite one.
    return x / x.square().sum(1, keepdim=True).clamp_min(1e-20).sqrt()
