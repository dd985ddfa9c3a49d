"""What a frozen network must offer to become an encoder, whichever library it comes from."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from vrpo.vision.key_values import read_keys_values

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


class EncoderOutput(NamedTuple):
    """What an encoder says of B images; None for what it was not asked for.

    Attributes:
        tokens: (B, N, C_e).
        keys, values: of the layer that made the tokens, at the same N places, heads side by side, (B, N, C_k) and
            (B, N, C_v); of an encoder without attention the tokens themselves.
        class_token: (B, C_e); of an encoder that has none the mean token.
    """

    tokens: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None
    class_token: Tensor | None = None


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

    def with_class_token(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the tokens and the class token (B, C), None where there is none."""
        return self.tokens(images), None

    def attention_block(self) -> nn.Module | None:
        """Return the block whose attention made the tokens; None for a network without attention over its grid."""
        return None

    def outputs(self, images: Tensor, *, keys_values: bool) -> EncoderOutput:
        """Return tokens and, where there are any, class token and the keys and values asked for.

        ``images`` are normalised, (B, 3, S, S).

        Raises:
            ConfigError: the keys and values cannot be read.
        """
        block = self.attention_block() if keys_values else None
        if block is None:
            tokens, class_token = self.with_class_token(images)
            return EncoderOutput(tokens, class_token=class_token)
        with read_keys_values(block, self.name) as found:
            tokens, class_token = self.with_class_token(images)
        # class and register tokens come first
        places = slice(-tokens.shape[1], None)
        return EncoderOutput(tokens, found.keys[:, places], found.values[:, places], class_token)

    @abstractmethod
    def pooled(self, images: Tensor) -> Tensor:
        """Return one feature vector (B, C_pool) for each normalised image (B, 3, S, S)."""
