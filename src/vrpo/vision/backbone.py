"""What a frozen network must offer to become an encoder, whichever library it comes from."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


class Backbone(nn.Module):
    """A frozen network over normalised square images.

    Attributes:
        name: what the user called it.
        feature: which of its token maps is read, as text.
        patches: whether it is a vision transformer, with a patch for each token.
        stride: input pixels for each token along a side.
        divisible: whether the input's side must be a multiple of ``stride``.
        fixed_input: the only input side it takes, or None.
        default_input: the input side it is used at where no grid asks for another.
        mean, std: normalisation of the channels of an image in [0, 1].
        weights_hash: SHA-256 of the weights file, or of the weights where they came without one.
    """

    name: str
    feature: str
    patches: bool = False
    stride: int
    divisible: bool = False
    fixed_input: int | None = None
    default_input: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    weights_hash: str

    @property
    def family(self) -> str:
        """``vit`` for patch tokens of a vision transformer, ``conv`` for positions of a feature map."""
        return "vit" if self.patches else "conv"

    @abstractmethod
    def tokens(self, images: Tensor) -> Tensor:
        """Return the tokens (B, n*n, C), row by row, of normalised images (B, 3, S, S)."""

    @abstractmethod
    def pooled(self, images: Tensor) -> Tensor:
        """Return one feature vector (B, C_pool) for each normalised image (B, 3, S, S)."""
