"""Between uint8 pixels and the model's range [-1, 1]."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def to_float(pixels: Tensor) -> Tensor:
    """Map uint8 pixels to float32 in [-1, 1]: x / 127.5 - 1."""
    return pixels.float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Map images in [-1, 1] to uint8 pixels: the floor of clamp(127.5 x + 128, 0, 255), as ADM does."""
    return images.float().mul(127.5).add_(128.0).clamp_(0.0, 255.0).byte()
