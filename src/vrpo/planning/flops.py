"""Floating-point operations in closed form: two for each multiply-add of a matrix product or convolution.

Everything else (norms, activations, the optimiser) is left out, as it is wherever models' costs are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vrpo.models.layers import TIME_FREQUENCIES
from vrpo.models.transformer import SIZES, parse_model_name

SD_VAE_CHANNELS = (128, 256, 512, 512)
SD_VAE_LAYERS = 2


@dataclass(frozen=True)
class TrunkFlops:
    """Operations of the transformer for one image.

    ``entry`` is what takes no gradient to its input (patch embedding, first layer of the time embedding), ``attention``
    the products of queries, keys and values, ``blocks`` the blocks' linear layers, ``rest`` all else.
    """

    entry: int
    attention: int
    blocks: int
    rest: int

    @property
    def forward(self) -> int:
        """One prediction."""
        return self.entry + self.attention + self.blocks + self.rest

    def training(self, *, checkpoint_blocks: bool = False) -> int:
        """Return a forward and a backward pass.

        The backward pass of a layer costs two forward passes, one where its input needs no gradient. Fused attention
        keeps no weights and computes them again: five products where the forward pass has two. Checkpointing runs every
        block's forward pass once more.
        """
        backward = self.entry + 2 * (self.blocks + self.rest) + self.attention * 5 // 2
        again = self.blocks + self.attention if checkpoint_blocks else 0
        return self.forward + backward + again


def trunk_flops(name: str, input_size: int, in_channels: int) -> TrunkFlops:
    """Return the operations of the model ``name``, such as "SiT-XL/2", for one image (C, H, W)."""
    kind, size, patch = parse_model_name(name)
    width, depth = SIZES[size].hidden_size, SIZES[size].depth
    tokens, values = (input_size // patch) ** 2, patch**2 * in_channels
    outputs = values * (2 if kind == "DiT" else 1)
    linear = tokens * width * (3 * width + width + 8 * width) + 6 * width**2  # qkv, output, perceptron; modulation
    return TrunkFlops(
        entry=2 * (tokens * values * width + TIME_FREQUENCIES * width),
        attention=2 * depth * 2 * tokens**2 * width,
        blocks=2 * depth * linear,
        rest=2 * (width**2 + 2 * width**2 + tokens * width * outputs),
    )


def autoencoder_flops(
    image_size: int,
    *,
    channels: Sequence[int] = SD_VAE_CHANNELS,
    layers: int = SD_VAE_LAYERS,
    latent_channels: int = 4,
) -> tuple[int, int]:
    """Return the operations of an AutoencoderKL's encoder and decoder for one image of ``image_size`` px.

    The defaults are Stable Diffusion's autoencoder (arXiv 2112.10752).
    """
    sides = [image_size // 2**level for level in range(len(channels))]
    middle = sides[-1] ** 2
    deepest = channels[-1]
    mid_block = 2 * _residual(deepest, deepest, middle) + _attention(deepest, middle)

    encoder = _conv(3, channels[0], sides[0] ** 2) + mid_block
    width = channels[0]
    for level, (own, side) in enumerate(zip(channels, sides, strict=True)):
        encoder += _residual(width, own, side**2) + (layers - 1) * _residual(own, own, side**2)
        width = own
        if level + 1 < len(channels):
            encoder += _conv(own, own, sides[level + 1] ** 2)
    encoder += _conv(deepest, 2 * latent_channels, middle) + _conv(2 * latent_channels, 2 * latent_channels, middle, 1)

    decoder = _conv(latent_channels, latent_channels, middle, 1) + _conv(latent_channels, deepest, middle) + mid_block
    width = deepest
    for level in reversed(range(len(channels))):
        own, cells = channels[level], sides[level] ** 2
        decoder += _residual(width, own, cells) + layers * _residual(own, own, cells)
        width = own
        if level:
            decoder += _conv(own, own, sides[level - 1] ** 2)
    return encoder, decoder + _conv(channels[0], 3, sides[0] ** 2)


def _conv(inputs: int, outputs: int, cells: int, kernel: int = 3) -> int:
    return 2 * cells * kernel**2 * inputs * outputs


def _residual(inputs: int, outputs: int, cells: int) -> int:
    shortcut = _conv(inputs, outputs, cells, 1) if inputs != outputs else 0
    return _conv(inputs, outputs, cells) + _conv(outputs, outputs, cells) + shortcut


def _attention(width: int, cells: int) -> int:
    return 4 * _conv(width, width, cells, 1) + 4 * cells**2 * width
